/* Llama's blocks: what is refused, tensors in parts, training, gradients, folders; and hosts that
   know GPT-2 alone. */
#include "check.h"

#include <math.h>

static const char *const QKV = "model.layers.0.self_attn.qkv_proj.weight";
static const char *const Q = "model.layers.0.self_attn.q_proj.weight";
static const char *const K = "model.layers.0.self_attn.k_proj.weight";
static const char *const V = "model.layers.0.self_attn.v_proj.weight";
static const char *const GATE_UP = "model.layers.0.mlp.gate_up_proj.weight";
static const char *const GATE = "model.layers.0.mlp.gate_proj.weight";
static const char *const UP = "model.layers.0.mlp.up_proj.weight";

enum { CHANNELS = 16, HEADS = 4, KV_HEADS = 2, HEAD = 6, MLP = 20 };
enum { Q_COUNT = HEADS * HEAD * CHANNELS, KV_COUNT = KV_HEADS * HEAD * CHANNELS };
enum { QKV_COUNT = Q_COUNT + 2 * KV_COUNT, GATE_COUNT = MLP * CHANNELS };
enum { RANK = 2, A_COUNT = RANK * CHANNELS, B_COUNT = QKV_COUNT / CHANNELS * RANK };

/* Nothing in it is what a default or another number says, too. */
static mxt_model_config llama_config(void) {
  mxt_model_config config = small_config();
  config.architecture = MXT_ARCHITECTURE_LLAMA;
  config.layers = 2;
  config.heads = HEADS;
  config.kv_heads = KV_HEADS;
  config.head_size = HEAD;
  config.channels = CHANNELS;
  config.mlp_channels = MLP;
  config.layer_norm_epsilon = 1e-6f;
  config.tied_head = 0;
  config.qk_norm = 1;
  config.rope_theta = 5e5;
  config.rope_scaling = MXT_ROPE_SCALING_LLAMA3;
  config.rope_factor = 8.0f;
  config.rope_low_frequency = 0.5f;
  config.rope_high_frequency = 3.0f;
  config.rope_original_context = 9;
  return config;
}

static mxt_model *new_llama(const mxt_engine *engine) {
  const mxt_model_config config = llama_config();
  mxt_model *model = NULL;
  OK(mxt_model_new(engine, &config, &model));
  return model;
}

static mxt_model_config config_of(const mxt_model *model) {
  mxt_model_config config;
  config.struct_size = sizeof config;
  OK(mxt_model_get_config(model, &config));
  return config;
}

static int is_llama_config(const mxt_model_config *found) {
  const mxt_model_config given = llama_config();
  return found->architecture == given.architecture && found->vocab_size == given.vocab_size &&
         found->context_length == given.context_length && found->layers == given.layers &&
         found->heads == given.heads && found->kv_heads == given.kv_heads &&
         found->head_size == given.head_size && found->channels == given.channels &&
         found->mlp_channels == given.mlp_channels && found->tied_head == given.tied_head &&
         found->layer_norm_epsilon == given.layer_norm_epsilon &&
         found->qkv_bias == given.qkv_bias && found->qk_norm == given.qk_norm &&
         found->rope_theta == given.rope_theta && found->rope_scaling == given.rope_scaling &&
         found->rope_factor == given.rope_factor &&
         found->rope_low_frequency == given.rope_low_frequency &&
         found->rope_high_frequency == given.rope_high_frequency &&
         found->rope_original_context == given.rope_original_context;
}

/* A model or a plan of `base` with `change` is an error that names `field`. */
#define REFUSED(field, base, change) \
  do { \
    mxt_model_config config = base; \
    mxt_model *none = NULL; \
    mxt_memory_plan plan; \
    plan.struct_size = sizeof plan; \
    change; \
    FAILS(MXT_ERROR_INVALID_ARGUMENT, field, mxt_model_new(engine, &config, &none)); \
    FAILS(MXT_ERROR_INVALID_ARGUMENT, field, mxt_plan(engine, &config, NULL, &plan)); \
    CHECK(none == NULL); \
  } while (0)

static void what_is_refused(const mxt_engine *engine) {
  const mxt_model_config llama = llama_config(), gpt2 = small_config();
  REFUSED("architecture: expected MXT_ARCHITECTURE_GPT2 (0) or", llama, config.architecture = 7);
  REFUSED("architecture", llama, config.architecture = -1);
  REFUSED("kv_heads: 3 do not divide 4", llama, config.kv_heads = 3);
  REFUSED("kv_heads", llama, config.kv_heads = 8);
  REFUSED("kv_heads", llama, config.kv_heads = SIZE_MAX);
  REFUSED("head_size: expected an even", llama, config.head_size = 5);
  REFUSED("head_size", llama, config.head_size = SIZE_MAX);
  REFUSED("head_size: expected an even", llama, (config.head_size = 0, config.channels = 12));
  REFUSED("heads", llama, (config.head_size = 0, config.channels = 18));
  REFUSED("qkv_bias", llama, config.qkv_bias = 1); /* It has qk_norm. */
  REFUSED("qkv_bias", llama, config.qkv_bias = 2);
  REFUSED("qk_norm", llama, config.qk_norm = -1);
  REFUSED("scale_attention", llama, config.scale_attention = 0);
  REFUSED("scale_attention_by_layer", llama, config.scale_attention_by_layer = 1);
  REFUSED("rope_theta", llama, config.rope_theta = 0.5);
  REFUSED("rope_theta", llama, config.rope_theta = (double)NAN);
  REFUSED("rope_theta", llama, config.rope_theta = 1e300);
  REFUSED("rope_scaling: expected MXT_ROPE_SCALING_NONE (0), ", llama, config.rope_scaling = 9);
  REFUSED("rope_scaling", llama, config.rope_scaling = -1);
  REFUSED("rope_factor: expected a number from 1 on, got 0.5", llama,
          (config.rope_scaling = MXT_ROPE_SCALING_LINEAR, config.rope_factor = 0.5f));
  REFUSED("rope_factor", llama, config.rope_factor = INFINITY);
  REFUSED("rope_low_frequency", llama, config.rope_low_frequency = 0.0f);
  REFUSED("rope_high_frequency: expected more than rope_low_frequency", llama,
          config.rope_low_frequency = config.rope_high_frequency);
  REFUSED("rope_high_frequency", llama, config.rope_high_frequency = NAN);
  REFUSED("rope_original_context", llama, config.rope_original_context = 0);
  REFUSED("rope_original_context", llama, config.rope_original_context = SIZE_MAX);

  REFUSED("kv_heads", gpt2, config.kv_heads = 1);
  REFUSED("head_size", gpt2, config.head_size = 4);
  REFUSED("qkv_bias", gpt2, config.qkv_bias = 1);
  REFUSED("qk_norm", gpt2, config.qk_norm = 1);
  REFUSED("rope", gpt2, config.rope_theta = 5e5);
  REFUSED("rope", gpt2, config.rope_scaling = MXT_ROPE_SCALING_LINEAR);
  REFUSED("rope_scaling", gpt2, config.rope_scaling = 9);

  /* What GPT-2's blocks have anyway, and what does not count. */
  mxt_model_config config = gpt2;
  mxt_model *model = NULL;
  config.kv_heads = config.heads;
  config.head_size = config.channels / config.heads;
  config.rope_factor = config.rope_low_frequency = -1.0f;
  OK(mxt_model_new(engine, &config, &model));
  config = config_of(model);
  CHECK(config.architecture == MXT_ARCHITECTURE_GPT2);
  CHECK(config.kv_heads == 0 && config.head_size == 0 && config.rope_factor == 1.0f);
  mxt_model_free(model);
}

/* The defaults of the C header, and the models that are Llamas but for a switch. */
static void kinds(const mxt_engine *engine) {
  mxt_model_config config = small_config();
  config.architecture = MXT_ARCHITECTURE_LLAMA;
  config.activation = MXT_ACTIVATION_GELU; /* SwiGLU whatever it is */
  mxt_model *model = NULL;
  OK(mxt_model_new(engine, &config, &model));
  mxt_model_config found = config_of(model);
  CHECK(found.architecture == MXT_ARCHITECTURE_LLAMA && found.tied_head == 1);
  CHECK(found.kv_heads == 0 && found.head_size == 0 && found.mlp_channels == 0);
  CHECK(found.rope_theta == 1e4 && found.rope_scaling == MXT_ROPE_SCALING_NONE);
  CHECK(found.rope_factor == 1.0f && found.rope_original_context == 8192);
  CHECK(found.rope_low_frequency == 1.0f && found.rope_high_frequency == 4.0f);
  /* Embedding, last norm, two norms, qkv, o, and the MLP: 8/3 of 16, rounded up, is 256. */
  CHECK(mxt_model_parameter_count(model) ==
        VOCABULARY * 16 + 16 + 2 * 16 + 48 * 16 + 16 * 16 + 3 * 256 * 16);
  mxt_model_free(model);

  config.qkv_bias = 1;
  config.kv_heads = 1;
  OK(mxt_model_new(engine, &config, &model));
  found = config_of(model);
  CHECK(found.qkv_bias == 1 && found.qk_norm == 0 && found.kv_heads == 1);
  float bias[32];
  OK(mxt_model_tensor_read(model, "model.layers.0.self_attn.qkv_proj.bias", bias, 32));
  OK(mxt_model_tensor_read(model, "model.layers.0.self_attn.v_proj.bias", bias, 8));
  CHECK(bias[0] == 0.0f && bias[31] == 0.0f);
  mxt_model_free(model);
  model = new_llama(engine);
  OK(mxt_model_tensor_read(model, "model.layers.1.self_attn.q_norm.weight", bias, HEAD));
  CHECK(bias[0] == 1.0f && bias[HEAD - 1] == 1.0f);
  mxt_model_free(model);
}

static float whole[QKV_COUNT], other[QKV_COUNT], part[QKV_COUNT];

static void tensors(const mxt_engine *engine) {
  mxt_model *model = new_llama(engine);
  int lists_qkv = 0;
  for (size_t i = 0; i < mxt_model_tensor_count(model); i++) {
    mxt_tensor_info info;
    info.struct_size = sizeof info;
    OK(mxt_model_tensor_info(model, i, &info));
    CHECK(strcmp(info.name, Q) != 0 && strcmp(info.name, GATE) != 0);
    if (strcmp(info.name, QKV) != 0) continue;
    lists_qkv = 1;
    CHECK(info.rank == 2 && info.shape[0] == QKV_COUNT / CHANNELS && info.shape[1] == CHANNELS);
  }
  CHECK(lists_qkv);

  const struct {
    const char *whole, *name;
    size_t first, count;
  } parts[] = {
      {QKV, Q, 0, Q_COUNT},
      {QKV, K, Q_COUNT, KV_COUNT},
      {QKV, V, Q_COUNT + KV_COUNT, KV_COUNT},
      {GATE_UP, GATE, 0, GATE_COUNT},
      {GATE_UP, UP, GATE_COUNT, GATE_COUNT},
  };
  for (int i = 0; i < 5; i++) {
    const size_t count = strcmp(parts[i].whole, QKV) == 0 ? QKV_COUNT : 2 * GATE_COUNT;
    const size_t first = parts[i].first, own = parts[i].count, behind = first + own;
    OK(mxt_model_tensor_read(model, parts[i].whole, whole, count));
    OK(mxt_model_tensor_read(model, parts[i].name, part, own));
    CHECK(memcmp(part, whole + first, own * sizeof *part) == 0);

    /* All of the part is written, and no more. */
    for (size_t k = 0; k < own; k++) part[k] = (float)k + 0.5f;
    OK(mxt_model_tensor_write(model, parts[i].name, part, own));
    OK(mxt_model_tensor_read(model, parts[i].whole, other, count));
    CHECK(memcmp(other, whole, first * sizeof *part) == 0);
    CHECK(memcmp(other + first, part, own * sizeof *part) == 0);
    CHECK(memcmp(other + behind, whole + behind, (count - behind) * sizeof *part) == 0);

    char expected[40];
    snprintf(expected, sizeof expected, "has %zu elements", own);
    FAILS(MXT_ERROR_INVALID_ARGUMENT, expected,
          mxt_model_tensor_read(model, parts[i].name, part, own - 1));
    FAILS(MXT_ERROR_INVALID_ARGUMENT, expected,
          mxt_model_tensor_read(model, parts[i].name, part, count));
    FAILS(MXT_ERROR_INVALID_ARGUMENT, expected,
          mxt_model_tensor_write(model, parts[i].name, part, own + 1));
    FAILS(MXT_ERROR_INVALID_ARGUMENT, parts[i].name,
          mxt_model_tensor_write(model, parts[i].name, part, 0));
    part[own - 1] = NAN;
    FAILS(MXT_ERROR_NOT_FINITE, parts[i].name,
          mxt_model_tensor_write(model, parts[i].name, part, own));
    OK(mxt_model_tensor_read(model, parts[i].whole, whole, count));
    CHECK(memcmp(other, whole, count * sizeof *part) == 0);
  }
  FAILS(MXT_ERROR_NO_SUCH_TENSOR, "layers.2",
        mxt_model_tensor_read(model, "model.layers.2.self_attn.q_proj.weight", part, Q_COUNT));
  FAILS(MXT_ERROR_NO_SUCH_TENSOR, "q_proj.bias",
        mxt_model_tensor_read(model, "model.layers.0.self_attn.q_proj.bias", part, Q_COUNT));
  FAILS(MXT_ERROR_NO_SUCH_TENSOR, "wte",
        mxt_model_tensor_read(model, "transformer.wte.weight", part, Q_COUNT));
  mxt_model_free(model);
  model = new_model(engine);
  FAILS(MXT_ERROR_NO_SUCH_TENSOR, Q, mxt_model_tensor_read(model, Q, part, Q_COUNT));
  mxt_model_free(model);
}

static void gradients(const mxt_engine *engine, const mxt_dataset *dataset) {
  mxt_model *model = new_llama(engine);
  mxt_trainer *trainer = new_trainer(model);
  step(trainer, dataset);
  OK(mxt_trainer_read_gradient(trainer, QKV, whole, QKV_COUNT));
  OK(mxt_trainer_read_gradient(trainer, K, part, KV_COUNT));
  CHECK(memcmp(part, whole + Q_COUNT, KV_COUNT * sizeof *part) == 0 && part[3] != 0.0f);
  FAILS(MXT_ERROR_INVALID_ARGUMENT, K, mxt_trainer_read_gradient(trainer, K, part, QKV_COUNT));

  /* Where none waits, those beside a part that is written are 0; where one does, they stay. */
  for (size_t i = 0; i < KV_COUNT; i++) part[i] = 1.0f + (float)i;
  OK(mxt_trainer_write_gradient(trainer, K, part, KV_COUNT));
  OK(mxt_trainer_read_gradient(trainer, QKV, whole, QKV_COUNT));
  for (size_t i = 0; i < QKV_COUNT; i++) {
    const size_t of_k = i - Q_COUNT;
    CHECK(whole[i] == (i >= Q_COUNT && of_k < KV_COUNT ? part[of_k] : 0.0f));
  }
  OK(mxt_trainer_write_gradient(trainer, V, part, KV_COUNT));
  OK(mxt_trainer_read_gradient(trainer, QKV, other, QKV_COUNT));
  CHECK(memcmp(other, whole, (Q_COUNT + KV_COUNT) * sizeof *part) == 0);
  CHECK(memcmp(other + Q_COUNT + KV_COUNT, part, KV_COUNT * sizeof *part) == 0);
  FAILS(MXT_ERROR_INVALID_ARGUMENT, V, mxt_trainer_write_gradient(trainer, V, part, 3));

  /* A tensor is trained as a whole. */
  int32_t is_trained = 7;
  FAILS(MXT_ERROR_NO_SUCH_TENSOR, QKV, mxt_trainer_is_trained(trainer, Q, &is_trained));
  FAILS(MXT_ERROR_NO_SUCH_TENSOR, QKV, mxt_trainer_scale_gradients(trainer, Q, 2.0f));
  CHECK(is_trained == 7);
  OK(mxt_trainer_is_trained(trainer, QKV, &is_trained));
  CHECK(is_trained == 1);
  mxt_trainer_free(trainer);
  trainer = NULL;

  mxt_trainer_options options = small_options();
  options.frozen = "*.qkv_proj.*";
  OK(mxt_trainer_new(model, &options, &trainer));
  step(trainer, dataset);
  FAILS(MXT_ERROR_INVALID_ARGUMENT, "frozen", mxt_trainer_read_gradient(trainer, Q, part, Q_COUNT));
  FAILS(MXT_ERROR_INVALID_ARGUMENT, "frozen",
        mxt_trainer_write_gradient(trainer, Q, part, Q_COUNT));
  OK(mxt_trainer_read_gradient(trainer, UP, part, GATE_COUNT));
  mxt_trainer_free(trainer);
  mxt_model_free(model);
}

/* Whether a file has a text. */
static int has_text(const char *path, const char *text) {
  static char content[1 << 16];
  FILE *file = fopen(path, "rb");
  CHECK(file != NULL);
  content[fread(content, 1, sizeof content - 1, file)] = '\0';
  CHECK(fclose(file) == 0);
  return strstr(content, text) != NULL;
}

static void training(const mxt_engine *engine, const mxt_dataset *dataset, const char *folder) {
  mxt_model *model = new_llama(engine);
  mxt_trainer *trainer = new_trainer(model);
  const float first = step(trainer, dataset).loss;
  for (int i = 1; i < 20; i++) step(trainer, dataset);
  const char *run = in_folder(folder, "run");
  OK(mxt_trainer_save(trainer, run));
  CHECK(has_text(in_folder(folder, "run/config.json"), "\"Qwen3ForCausalLM\""));

  /* It goes on with the same bits, and so does another that was loaded. */
  mxt_trainer *resumed = NULL;
  OK(mxt_trainer_load(engine, run, &resumed));
  CHECK(mxt_trainer_steps_done(resumed) == 20);
  for (int i = 0; i < 3; i++) {
    const float loss = step(trainer, dataset).loss;
    CHECK(step(resumed, dataset).loss == loss);
    CHECK(loss < first);
  }
  mxt_model *of_resumed = NULL;
  OK(mxt_trainer_model(resumed, &of_resumed));
  mxt_model_config found = config_of(of_resumed);
  CHECK(is_llama_config(&found));
  OK(mxt_model_tensor_read(model, Q, whole, Q_COUNT));
  OK(mxt_model_tensor_read(of_resumed, Q, other, Q_COUNT));
  CHECK(memcmp(whole, other, Q_COUNT * sizeof *whole) == 0);
  mxt_model_free(of_resumed);
  mxt_trainer_free(resumed);

  /* A folder's configuration makes the same model anew. */
  mxt_model *loaded = NULL, *again = NULL;
  OK(mxt_model_load(engine, run, &loaded));
  found = config_of(loaded);
  CHECK(is_llama_config(&found));
  OK(mxt_model_new(engine, &found, &again));
  found = config_of(again);
  CHECK(is_llama_config(&found));
  CHECK(mxt_model_parameter_count(again) == mxt_model_parameter_count(model));
  mxt_model_free(again);
  mxt_model_free(loaded);

  /* What is kept of a text gives the logits of the whole computation, and the same text. */
  const uint32_t prompt[] = {0, 1, 4};
  uint32_t text[8], last[1];
  size_t written = 0;
  float logits[VOCABULARY];
  mxt_generate_options greedy;
  OK(mxt_generate_options_init(&greedy, sizeof greedy));
  greedy.temperature = 0.0f;
  greedy.max_tokens = 8;
  OK(mxt_model_generate(model, &greedy, prompt, 3, text, 8, &written));
  CHECK(written == 8);
  OK(mxt_model_next_logits(model, prompt, 3, logits, VOCABULARY));
  for (int i = 0; i < VOCABULARY; i++) CHECK(logits[i] <= logits[text[0]]);
  uint32_t longer[] = {0, 1, 4, text[0], text[1], text[2]};
  greedy.max_tokens = 1;
  OK(mxt_model_generate(model, &greedy, longer, 6, last, 1, &written));
  CHECK(last[0] == text[3]);

  mxt_trainer_free(trainer);
  mxt_model_free(model);
}

/* Adapters stand beside what makes queries, keys and values at once; files have those of each. */
static void adapters(const mxt_engine *engine, const mxt_dataset *dataset, const char *folder) {
  mxt_model *model = new_llama(engine), *adapted = NULL, *again = NULL, *merged = NULL;
  OK(mxt_model_with_lora(model, RANK, 0.0f, MXT_LORA_LAYER_ATTN_C_ATTN, &adapted));
  mxt_trainer *trainer = new_trainer(adapted);
  for (int i = 0; i < 3; i++) step(trainer, dataset);
  OK(mxt_model_tensor_read(adapted, QKV, whole, QKV_COUNT));
  OK(mxt_model_tensor_read(model, QKV, other, QKV_COUNT));
  CHECK(memcmp(whole, other, QKV_COUNT * sizeof *whole) == 0);
  const char *of_a = "model.layers.0.self_attn.qkv_proj.lora_A.weight";
  const char *of_b = "model.layers.0.self_attn.qkv_proj.lora_B.weight";
  float a[A_COUNT], b[B_COUNT], copy[B_COUNT];
  OK(mxt_model_tensor_read(adapted, of_a, a, A_COUNT));
  OK(mxt_model_tensor_read(adapted, of_b, b, B_COUNT));
  CHECK(b[0] != 0.0f);

  const char *adapter = in_folder(folder, "adapter");
  OK(mxt_model_save_lora(adapted, adapter));
  CHECK(has_text(in_folder(folder, "adapter/adapter_config.json"), "\"self_attn.k_proj\""));
  OK(mxt_model_load_lora(model, adapter, &again));
  CHECK(config_of(again).lora_rank == RANK && config_of(again).lora_alpha == 2.0f * RANK);
  OK(mxt_model_tensor_read(again, of_b, copy, B_COUNT));
  CHECK(memcmp(b, copy, sizeof b) == 0);

  OK(mxt_model_merge_lora(adapted, &merged));
  OK(mxt_model_tensor_read(merged, V, part, KV_COUNT));
  for (int row = 0; row < KV_HEADS * HEAD; row++)
    for (int in = 0; in < CHANNELS; in++) {
      const int out = (HEADS + KV_HEADS) * HEAD + row;
      double sum = 0.0;
      for (int r = 0; r < RANK; r++) sum += (double)b[out * RANK + r] * a[r * CHANNELS + in];
      CHECK(fabs(part[row * CHANNELS + in] - other[out * CHANNELS + in] - 2.0 * sum) < 1e-6);
    }
  mxt_model_free(merged);
  mxt_model_free(again);
  mxt_model_free(adapted);
  mxt_trainer_free(trainer);
  mxt_model_free(model);
}

/* A program of the header before there were Llamas makes GPT-2s, whatever lies behind its struct,
   and is told no more of a Llama than it has room for. */
static void older_programs(const mxt_engine *engine) {
  const size_t older = offsetof(mxt_model_config, kv_heads);
  mxt_model_config config = llama_config();
  config.struct_size = older;
  config.architecture = MXT_ARCHITECTURE_GPT2;
  mxt_model *model = NULL;
  OK(mxt_model_new(engine, &config, &model));
  mxt_model_config found = config_of(model);
  CHECK(found.architecture == MXT_ARCHITECTURE_GPT2 && found.heads == HEADS);
  CHECK(found.kv_heads == 0 && found.head_size == 0 && found.qk_norm == 0);
  CHECK(found.rope_theta == 1e4 && found.rope_scaling == MXT_ROPE_SCALING_NONE);
  mxt_model_free(model);

  memset(&config, 0x5a, sizeof config);
  OK(mxt_model_config_init(&config, older));
  CHECK(config.struct_size == older && config.rope_scaling == 0x5a5a5a5a);
  model = new_llama(engine);
  OK(mxt_model_get_config(model, &config));
  CHECK(config.struct_size == older && config.architecture == MXT_ARCHITECTURE_LLAMA);
  CHECK(config.heads == HEADS && config.qk_norm == 0x5a5a5a5a);
  mxt_model_free(model);
}

int main(int argc, char **argv) {
  CHECK(argc == 2);
  mxt_engine *engine = new_engine();
  mxt_dataset *dataset = new_dataset();
  what_is_refused(engine);
  kinds(engine);
  tensors(engine);
  gradients(engine, dataset);
  training(engine, dataset, argv[1]);
  adapters(engine, dataset, argv[1]);
  older_programs(engine);
  mxt_dataset_free(dataset);
  mxt_engine_free(engine);
  return 0;
}
