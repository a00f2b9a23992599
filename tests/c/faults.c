/* A defect behind every function: the call says MXT_ERROR_PANIC, the handle is unusable and can be
 * freed, other handles and the host go on. In a debug build of the library, the function
 * that MXT_FAULT names panics. */
#define _GNU_SOURCE
#include "check.h"

#include <stdlib.h>

static mxt_engine *engine;
static mxt_model *model;
static mxt_dataset *dataset;
static mxt_trainer *trainer;
static const char *folder;

/* The library has told of the fault, with the function's name and the place. */
static void check_message(const char *function) {
  const char *text = mxt_last_error();
  const size_t length = strcspn(function, "( ");
  CHECK(strncmp(text, function, length) == 0 && text[length] == ':');
  CHECK(strstr(text, "panic at ") != NULL && strstr(text, "injected fault") != NULL);
}

static void arm(const char *call) {
  char name[128];
  CHECK(strcspn(call, "(") < sizeof name);
  snprintf(name, sizeof name, "%.*s", (int)strcspn(call, "("), call);
  CHECK(setenv("MXT_FAULT", name, 1) == 0);
}

static void disarm(void) { CHECK(unsetenv("MXT_FAULT") == 0); }

#define PANICS(call) \
  do { \
    arm(#call); \
    const mxt_status got_ = (call); \
    disarm(); \
    RETURNS(MXT_ERROR_PANIC, got_); \
    check_message(#call); \
  } while (0)

/* A function that returns a number or a text: nothing, with a message. */
#define IS_NOTHING(call) \
  do { \
    arm(#call); \
    const int nothing_ = (call) == 0; \
    disarm(); \
    CHECK(nothing_); \
    check_message(#call); \
  } while (0)

static void start(void) {
  engine = new_engine();
  model = new_model(engine);
  dataset = new_dataset();
  trainer = new_trainer(model);
}

static void end(void) {
  mxt_trainer_free(trainer);
  mxt_dataset_free(dataset);
  mxt_model_free(model);
  mxt_engine_free(engine);
}

/* A call on the trainer: afterwards the trainer and its model, maybe half changed, refuse. */
#define TRAINER_PANICS(call) \
  do { \
    uint64_t before_; \
    start(); \
    before_ = mxt_trainer_steps_done(trainer); \
    PANICS(call); \
    CHECK(strstr(mxt_trainer_last_error(trainer), "injected fault") != NULL); \
    RETURNS(MXT_ERROR_POISONED, mxt_trainer_step(trainer, dataset, NULL)); \
    RETURNS(MXT_ERROR_POISONED, mxt_trainer_save(trainer, folder)); \
    RETURNS(MXT_ERROR_POISONED, mxt_model_save(model, folder)); \
    CHECK(strstr(mxt_trainer_last_error(trainer), "injected fault") != NULL); \
    CHECK(mxt_trainer_steps_done(trainer) == before_); \
    end(); \
  } while (0)

#define MODEL_PANICS(call) \
  do { \
    start(); \
    PANICS(call); \
    CHECK(strstr(mxt_model_last_error(model), "injected fault") != NULL); \
    RETURNS(MXT_ERROR_POISONED, mxt_model_save(model, folder)); \
    RETURNS(MXT_ERROR_POISONED, mxt_trainer_step(trainer, dataset, NULL)); \
    end(); \
  } while (0)

/* A call on a decoder of a text of one token: afterwards it refuses. */
#define DECODER_PANICS(call) \
  do { \
    mxt_decoder *decoder = NULL; \
    start(); \
    OK(mxt_decoder_new(model, NULL, &decoder)); \
    OK(mxt_decoder_push(decoder, 0, &token, 1)); \
    PANICS(call); \
    CHECK(strstr(mxt_decoder_last_error(decoder), "injected fault") != NULL); \
    RETURNS(MXT_ERROR_POISONED, mxt_decoder_rewind(decoder, 0, 0)); \
    mxt_decoder_free(decoder); \
    end(); \
  } while (0)

/* A call on a snapshot: afterwards it refuses. */
#define SNAPSHOT_PANICS(call) \
  do { \
    mxt_snapshot *snapshot = NULL; \
    start(); \
    OK(mxt_trainer_snapshot(trainer, &snapshot)); \
    PANICS(call); \
    CHECK(strstr(mxt_snapshot_last_error(snapshot), "injected fault") != NULL); \
    RETURNS(MXT_ERROR_POISONED, mxt_snapshot_save(snapshot, folder)); \
    RETURNS(MXT_ERROR_POISONED, mxt_snapshot_renew(snapshot, trainer)); \
    mxt_snapshot_free(snapshot); \
    end(); \
  } while (0)

/* A call on files: afterwards they refuse. */
#define FILES_PANICS(call) \
  do { \
    mxt_files *files = NULL; \
    start(); \
    OK(mxt_files_in_memory(&files)); \
    OK(mxt_files_put(files, "x", "x", 1)); \
    PANICS(call); \
    CHECK(strstr(mxt_files_last_error(files), "injected fault") != NULL); \
    RETURNS(MXT_ERROR_POISONED, mxt_files_put(files, "x", "x", 1)); \
    RETURNS(MXT_ERROR_POISONED, mxt_model_save_to(model, files, MXT_STORED_WEIGHTS_F32)); \
    mxt_files_free(files); \
    end(); \
  } while (0)

/* A call that makes something: nothing is made, the parent stays usable. */
#define MAKING_PANICS(call, made) \
  do { \
    made = NULL; \
    PANICS(call); \
    CHECK(made == NULL); \
    OK(call); \
  } while (0)

/* A free: the handle is gone, whatever happens behind. */
#define FREE_PANICS(call) \
  do { \
    arm(#call); \
    call; \
    disarm(); \
    check_message(#call); \
  } while (0)

#define TEXT_PANICS(call) \
  do { \
    arm(#call); \
    CHECK(strstr(call, "injected fault") != NULL); \
    disarm(); \
  } while (0)

static int32_t fill(void *user_data, uint64_t number, uint32_t *to, float *weights, size_t length) {
  (void)user_data, (void)number, (void)weights;
  memset(to, 0, (length + 1) * sizeof *to);
  return 0;
}

static int32_t fill_packed(void *user_data, uint64_t number, uint32_t *to, float *weights,
                           uint32_t *documents, size_t length) {
  (void)documents;
  return fill(user_data, number, to, weights, length);
}

static int32_t no_file(void *user_data, const char *name, void **file, uint64_t *size) {
  (void)user_data, (void)name, (void)file, (void)size;
  return MXT_NO_SUCH_FILE;
}

static int32_t no_read(void *user_data, void *file, uint64_t offset, void *to, size_t count) {
  (void)user_data, (void)file, (void)offset, (void)to, (void)count;
  return 1;
}

static int32_t no_close(void *user_data, void *file) {
  (void)user_data, (void)file;
  return 0;
}

static void making(const char *tokens) {
  mxt_engine_options engine_options;
  mxt_group group;
  mxt_model_config config;
  mxt_trainer_options trainer_options;
  mxt_generate_options generate;
  mxt_run_options run;
  mxt_dataset_options dataset_options;
  mxt_decoder_options decoder_options;
  mxt_batch batch;
  mxt_decoder *decoder = NULL;
  mxt_memory_plan plan;
  mxt_model *other_model;
  mxt_trainer *other;
  mxt_snapshot *snapshot;
  mxt_dataset *other_dataset;
  mxt_files *files, *archive;
  mxt_file_callbacks callbacks;
  const uint32_t some[] = {1, 2, 3};

  PANICS(mxt_engine_options_init(&engine_options, sizeof engine_options));
  PANICS(mxt_group_init(&group, sizeof group));
  PANICS(mxt_model_config_init(&config, sizeof config));
  PANICS(mxt_trainer_options_init(&trainer_options, sizeof trainer_options));
  PANICS(mxt_generate_options_init(&generate, sizeof generate));
  PANICS(mxt_run_options_init(&run, sizeof run));
  PANICS(mxt_dataset_options_init(&dataset_options, sizeof dataset_options));
  PANICS(mxt_decoder_options_init(&decoder_options, sizeof decoder_options));
  PANICS(mxt_batch_init(&batch, sizeof batch));
  PANICS(mxt_file_callbacks_init(&callbacks, sizeof callbacks));

  OK(mxt_engine_options_init(&engine_options, sizeof engine_options));
  MAKING_PANICS(mxt_engine_new(&engine_options, &engine), engine);
  config = small_config();
  MAKING_PANICS(mxt_model_new(engine, &config, &model), model);
  CHECK(strstr(mxt_engine_last_error(engine), "injected fault") != NULL);
  MAKING_PANICS(mxt_decoder_new(model, NULL, &decoder), decoder);
  trainer_options = small_options();
  MAKING_PANICS(mxt_trainer_new(model, &trainer_options, &trainer), trainer);
  MAKING_PANICS(mxt_trainer_snapshot(trainer, &snapshot), snapshot);
  OK(mxt_trainer_save(trainer, folder));
  MAKING_PANICS(mxt_trainer_load(engine, folder, &other), other);
  mxt_trainer_free(other);
  MAKING_PANICS(mxt_trainer_load_as(engine, folder, "adamw", &other), other);
  mxt_trainer_free(other);
  MAKING_PANICS(mxt_model_load(engine, folder, &other_model), other_model);
  mxt_model_free(other_model);
  MAKING_PANICS(mxt_files_in_memory(&files), files);
  OK(mxt_trainer_save_to(trainer, files));
  MAKING_PANICS(mxt_trainer_load_from(engine, files, NULL, &other), other);
  mxt_trainer_free(other);
  MAKING_PANICS(mxt_model_load_from(engine, files, &other_model), other_model);
  mxt_model_free(other_model);
  OK(mxt_file_callbacks_init(&callbacks, sizeof callbacks));
  callbacks.open = no_file;
  callbacks.read = no_read;
  callbacks.close = no_close;
  MAKING_PANICS(mxt_files_from_callbacks(&callbacks, &archive), archive);
  mxt_files_free(archive);
  plan.struct_size = sizeof plan;
  PANICS(mxt_plan(engine, &config, &trainer_options, &plan));
  OK(mxt_plan(engine, &config, &trainer_options, &plan));
  MAKING_PANICS(mxt_dataset_open(tokens, &dataset), dataset);
  mxt_dataset_free(dataset);
  MAKING_PANICS(mxt_dataset_open_with(tokens, NULL, &dataset), dataset);
  mxt_dataset_free(dataset);
  MAKING_PANICS(mxt_dataset_open_files_with(&tokens, 1, NULL, &dataset), dataset);
  mxt_dataset_free(dataset);
  MAKING_PANICS(mxt_dataset_open_files(&tokens, 1, &dataset), dataset);
  MAKING_PANICS(mxt_dataset_from_tokens(some, 3, &other_dataset), other_dataset);
  mxt_dataset_free(other_dataset);
  MAKING_PANICS(mxt_dataset_from_memory(some, 3, MXT_TOKEN_TYPE_U32, NULL, NULL, &other_dataset),
                other_dataset);
  mxt_dataset_free(other_dataset);
  MAKING_PANICS(mxt_dataset_from_windows(3, fill, NULL, NULL, &other_dataset), other_dataset);
  mxt_dataset_free(other_dataset);
  MAKING_PANICS(mxt_dataset_from_packed_windows(3, fill_packed, NULL, NULL, &other_dataset),
                other_dataset);
  mxt_dataset_free(other_dataset);

  IS_NOTHING(mxt_engine_threads(engine));
  IS_NOTHING(mxt_engine_seed(engine));
  IS_NOTHING(mxt_engine_ranks(engine));
  IS_NOTHING(mxt_engine_rank(engine));
  IS_NOTHING(mxt_engine_device(engine));
  IS_NOTHING(mxt_model_parameter_count(model));
  IS_NOTHING(mxt_model_tensor_count(model));
  IS_NOTHING(mxt_dataset_token_count(dataset));
  IS_NOTHING(mxt_files_count(files));
  IS_NOTHING(mxt_files_name(files, 0));
  IS_NOTHING(mxt_trainer_steps_done(trainer));
  IS_NOTHING(mxt_trainer_schedule_start(trainer));
  TEXT_PANICS(mxt_engine_last_error(engine));
  TEXT_PANICS(mxt_model_last_error(model));
  TEXT_PANICS(mxt_dataset_last_error(dataset));
  TEXT_PANICS(mxt_trainer_last_error(trainer));
  TEXT_PANICS(mxt_decoder_last_error(decoder));
  TEXT_PANICS(mxt_snapshot_last_error(snapshot));
  TEXT_PANICS(mxt_files_last_error(files));

  FREE_PANICS(mxt_files_free(files));
  FREE_PANICS(mxt_snapshot_free(snapshot));
  FREE_PANICS(mxt_decoder_free(decoder));
  FREE_PANICS(mxt_trainer_free(trainer));
  FREE_PANICS(mxt_dataset_free(dataset));
  FREE_PANICS(mxt_model_free(model));
  FREE_PANICS(mxt_engine_free(engine));
}

/* The second step of a run panics: the run is over, and says so. */
static int32_t arm_run(void *user_data, const mxt_step_stats *stats, const mxt_eval_stats *eval) {
  (void)user_data, (void)stats, (void)eval;
  arm("mxt_trainer_run");
  return 0;
}

int main(int argc, char **argv) {
  CHECK(argc == 2);
  const uint32_t some[BATCH * (CONTEXT + 1)] = {1, 2, 3};
  const uint16_t words[4] = {1, 2, 3, 4};
  mxt_step_stats stats;
  mxt_eval_stats eval;
  mxt_model_config config;
  mxt_tensor_info info;
  mxt_tensor_update update;
  mxt_weight_metrics metrics;
  mxt_trainer_options options;
  mxt_run_options run;
  mxt_batch batch;
  mxt_model *other = NULL;
  float values[16] = {0}, logits[VOCABULARY];
  uint32_t token = 1;
  size_t written = 77;
  char tokens[4096];
  FILE *file;

  folder = argv[1];
  snprintf(tokens, sizeof tokens, "%s/tokens.bin", argv[1]);
  CHECK((file = fopen(tokens, "wb")) != NULL && fwrite(words, 2, 4, file) == 4);
  CHECK(fclose(file) == 0);
  folder = strdup(in_folder(argv[1], "checkpoint"));

  /* The fault is a fault of this build only. */
  arm("mxt_version");
  CHECK(mxt_version()[0] != 0 && mxt_status_string(MXT_OK)[0] != 0);
  arm("mxt_build_info");
  CHECK(strcmp(mxt_build_info(), "{}") == 0);
  disarm();
  CHECK(strstr(mxt_build_info(), "\"abi\"") != NULL);

  making(tokens);

  stats.struct_size = sizeof stats;
  stats.step = 77;
  eval.struct_size = sizeof eval;
  eval.tokens = 77;
  config.struct_size = sizeof config;
  info.struct_size = sizeof info;
  update.struct_size = sizeof update;
  update.step = 77;
  metrics.struct_size = sizeof metrics;
  metrics.step = 77;
  options.struct_size = sizeof options;
  OK(mxt_run_options_init(&run, sizeof run));
  run.steps = 3;
  OK(mxt_batch_init(&batch, sizeof batch));
  batch.count = BATCH * CONTEXT;
  batch.tokens = some;
  batch.targets = some;

  TRAINER_PANICS(mxt_trainer_step(trainer, dataset, &stats));
  TRAINER_PANICS(mxt_trainer_step_unless_stopped(trainer, dataset, &stats));
  TRAINER_PANICS(mxt_trainer_step_tokens(trainer, some, BATCH * (CONTEXT + 1), &stats));
  TRAINER_PANICS(mxt_trainer_forward_backward(trainer, &batch));
  TRAINER_PANICS(mxt_trainer_forward(trainer, &batch, &eval));
  TRAINER_PANICS(mxt_trainer_update(trainer, &stats));
  TRAINER_PANICS(mxt_trainer_zero_gradients(trainer));
  TRAINER_PANICS(mxt_trainer_scale_gradients(trainer, NULL, 1.0f));
  int32_t is_trained = 77;
  TRAINER_PANICS(mxt_trainer_is_trained(trainer, "transformer.ln_f.bias", &is_trained));
  CHECK(is_trained == 77);
  TRAINER_PANICS(mxt_trainer_read_gradient(trainer, "transformer.ln_f.bias", values, 16));
  TRAINER_PANICS(mxt_trainer_write_gradient(trainer, "transformer.ln_f.bias", values, 16));
  TRAINER_PANICS(mxt_trainer_eval(trainer, dataset, 1, &eval));
  TRAINER_PANICS(mxt_trainer_save(trainer, folder));
  TRAINER_PANICS(mxt_trainer_set_sharpness(trainer, 1e-3f));
  TRAINER_PANICS(mxt_trainer_watch_updates(trainer, 1));
  TRAINER_PANICS(mxt_trainer_tensor_update(trainer, "transformer.ln_f.bias", &update));
  TRAINER_PANICS(mxt_trainer_watch_weights(trainer, 0));
  TRAINER_PANICS(mxt_trainer_weight_metrics(trainer, NULL, &metrics));
  TRAINER_PANICS(mxt_trainer_set_lr(trainer, 1e-3f));
  TRAINER_PANICS(mxt_trainer_use_schedule(trainer));
  TRAINER_PANICS(mxt_trainer_set_schedule(trainer, &options));
  TRAINER_PANICS(mxt_trainer_model(trainer, &other));
  TRAINER_PANICS(mxt_trainer_get_options(trainer, &options));
  TRAINER_PANICS(mxt_trainer_run(trainer, dataset, &run, NULL));
  SNAPSHOT_PANICS(mxt_snapshot_save(snapshot, folder));
  SNAPSHOT_PANICS(mxt_snapshot_renew(snapshot, trainer));
  mxt_files *memory = NULL;
  const void *bytes = NULL;
  OK(mxt_files_in_memory(&memory));
  TRAINER_PANICS(mxt_trainer_save_to(trainer, memory));
  SNAPSHOT_PANICS(mxt_snapshot_save_to(snapshot, memory));
  MODEL_PANICS(mxt_model_save_to(model, memory, MXT_STORED_WEIGHTS_F32));
  MODEL_PANICS(mxt_model_save_lora_to(model, memory));
  MODEL_PANICS(mxt_model_load_lora_from(model, memory, &other));
  CHECK(mxt_files_count(memory) == 0);
  mxt_files_free(memory);
  FILES_PANICS(mxt_files_view(files, "x", &bytes, &written));
  FILES_PANICS(mxt_files_put(files, "y", "y", 1));
  FILES_PANICS(mxt_files_lend(files, "y", "y", 1, NULL, NULL));
  FILES_PANICS(mxt_files_remove(files, "x"));
  CHECK(bytes == NULL && written == 77);
  CHECK(stats.step == 77 && eval.tokens == 77 && other == NULL);
  CHECK(update.step == 77 && metrics.step == 77);

  mxt_memory_use in_use;
  in_use.struct_size = sizeof in_use;
  in_use.host_limit = 77;
  start();
  PANICS(mxt_engine_memory(engine, &in_use));
  RETURNS(MXT_ERROR_POISONED, mxt_engine_memory(engine, &in_use));
  CHECK(in_use.host_limit == 77);
  end();

  MODEL_PANICS(mxt_model_save(model, folder));
  MODEL_PANICS(mxt_model_save_as(model, folder, MXT_STORED_WEIGHTS_BF16));
  MODEL_PANICS(mxt_model_with_lora(model, 1, 0, 0, &other));
  MODEL_PANICS(mxt_model_merge_lora(model, &other));
  MODEL_PANICS(mxt_model_save_lora(model, folder));
  MODEL_PANICS(mxt_model_load_lora(model, folder, &other));
  MODEL_PANICS(mxt_model_get_config(model, &config));
  CHECK(other == NULL);
  MODEL_PANICS(mxt_model_tensor_info(model, 0, &info));
  MODEL_PANICS(mxt_model_tensor_read(model, "transformer.ln_f.bias", values, 16));
  MODEL_PANICS(mxt_model_tensor_write(model, "transformer.ln_f.bias", values, 16));
  MODEL_PANICS(mxt_model_generate(model, NULL, &token, 1, NULL, 0, &written));
  MODEL_PANICS(mxt_model_next_logits(model, &token, 1, logits, VOCABULARY));
  MODEL_PANICS(mxt_model_score(model, 0, &token, 1, (const size_t[]){1}, 1, logits, NULL));
  CHECK(written == 77);

  DECODER_PANICS(mxt_decoder_push(decoder, 0, &token, 1));
  DECODER_PANICS(mxt_decoder_logits(decoder, 0, logits, VOCABULARY));
  DECODER_PANICS(mxt_decoder_logits_from(decoder, 0, 0, logits, VOCABULARY));
  const size_t first = 0;
  static uint32_t new_tokens[256];
  DECODER_PANICS(mxt_decoder_logits_of(decoder, &first, 1, logits, VOCABULARY));
  DECODER_PANICS(mxt_decoder_generate(decoder, 0, NULL, NULL, 0, &written));
  DECODER_PANICS(mxt_decoder_generate_each(decoder, &first, 1, NULL, new_tokens, 256, &written));
  DECODER_PANICS(mxt_decoder_rewind(decoder, 0, 0));
  DECODER_PANICS(mxt_decoder_fork(decoder, 0, 0));
  DECODER_PANICS(mxt_decoder_tokens(decoder, 0, NULL, 0, &written));
  CHECK(written == 77);

  start();
  PANICS(mxt_dataset_max_token(dataset, &token));
  RETURNS(MXT_ERROR_POISONED, mxt_dataset_max_token(dataset, &token));
  CHECK(token == 1);
  end();

  mxt_coverage coverage;
  coverage.struct_size = sizeof coverage;
  coverage.files = 77;
  start();
  PANICS(mxt_dataset_coverage(dataset, 8, &coverage));
  RETURNS(MXT_ERROR_POISONED, mxt_dataset_coverage(dataset, 8, &coverage));
  CHECK(coverage.files == 77);
  end();

  start();
  PANICS(mxt_dataset_read(dataset, 0, 1, &token));
  RETURNS(MXT_ERROR_POISONED, mxt_dataset_read(dataset, 0, 1, &token));
  CHECK(token == 1);
  end();

  start();
  run.on_step = arm_run;
  const mxt_status status = mxt_trainer_run(trainer, dataset, &run, NULL);
  disarm();
  RETURNS(MXT_ERROR_PANIC, status);
  CHECK(mxt_trainer_steps_done(trainer) == 1);
  RETURNS(MXT_ERROR_POISONED, mxt_trainer_run(trainer, dataset, &run, NULL));
  /* Another trainer of this process is not touched. */
  mxt_model *fresh_model = new_model(engine);
  mxt_trainer *fresh = new_trainer(fresh_model);
  step(fresh, dataset);
  mxt_trainer_free(fresh);
  mxt_model_free(fresh_model);
  end();
  free((void *)folder);
  return 0;
}
