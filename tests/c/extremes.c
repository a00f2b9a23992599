/* The largest numbers that every argument can hold: errors, never a panic or a crash. */
#include "check.h"

static const size_t most = (size_t)-1;

static int32_t stop_at_once(void *user_data, uint32_t token) {
  (void)user_data, (void)token;
  return 1;
}

static int32_t end_run(void *user_data, const mxt_step_stats *step, const mxt_eval_stats *eval) {
  (void)user_data, (void)step, (void)eval;
  return 1;
}

/* An error of the caller's, told as such. */
static void is_refused(mxt_status status) {
  if (status != MXT_ERROR_INVALID_ARGUMENT && status != MXT_ERROR_OUT_OF_MEMORY) OK(status);
  CHECK(status != MXT_OK);
}

int main(void) {
  mxt_engine *engine = new_engine();
  mxt_model *model = new_model(engine), *other = NULL;
  mxt_dataset *dataset = new_dataset(), *no_dataset = NULL;
  mxt_trainer *trainer = new_trainer(model), *no_trainer = NULL;
  mxt_memory_plan plan;
  plan.struct_size = sizeof plan;

  /* Each size of a model alone, and all at their limits: more memory than any machine has. */
  for (int field = 0; field < 8; field++) {
    mxt_model_config config = small_config();
    size_t *fields[] = {&config.vocab_size,   &config.context_length, &config.layers,
                        &config.heads,        &config.channels,       &config.kv_heads,
                        &config.mlp_channels, &config.head_size};
    if (field > 4) config.architecture = MXT_ARCHITECTURE_LLAMA;
    *fields[field] = most;
    is_refused(mxt_model_new(engine, &config, &other));
    is_refused(mxt_plan(engine, &config, NULL, &plan));
  }
  mxt_model_config config = small_config();
  config.vocab_size = config.context_length = (size_t)1 << 24;
  config.layers = 4095;
  config.heads = 1;
  config.channels = (size_t)1 << 20;
  is_refused(mxt_model_new(engine, &config, &other));
  CHECK(other == NULL);

  mxt_model_config llama = config;
  llama.architecture = MXT_ARCHITECTURE_LLAMA;
  llama.heads = llama.head_size = (size_t)1 << 16;
  llama.mlp_channels = (size_t)1 << 22;
  is_refused(mxt_model_new(engine, &llama, &other));
  is_refused(mxt_plan(engine, &llama, NULL, &plan));
  llama.head_size = 64;
  llama.tied_head = 0;
  llama.qkv_bias = 1;
  is_refused(mxt_model_new(engine, &llama, &other));
  CHECK(other == NULL);

  /* A plan of any legal size is a number, or an error if it is none. */
  mxt_trainer_options options = small_options();
  options.batch_size = 64;
  options.sequence_length = 1024;
  OK(mxt_plan(engine, &config, &options, &plan));
  CHECK(plan.total > plan.weights && plan.weights > (uint64_t)1 << 50);
  OK(mxt_plan(engine, &llama, &options, &plan));
  CHECK(plan.total > plan.weights && plan.weights > (uint64_t)1 << 50);
  options.batch_size = (size_t)1 << 20;
  options.sequence_length = config.context_length;
  const mxt_status status = mxt_plan(engine, &config, &options, &plan);
  if (status != MXT_OK) is_refused(status);

  /* Legal numbers that make more rows than any memory holds: they are counted, not allocated. */
  mxt_model_config wide = small_config();
  wide.context_length = (size_t)1 << 24;
  options = small_options();
  options.batch_size = (size_t)1 << 20;
  OK(mxt_plan(engine, &wide, &options, &plan));
  CHECK(plan.total >> 50 != 0);

  for (int field = 0; field < 3; field++) {
    options = small_options();
    size_t *fields[] = {&options.batch_size, &options.sequence_length, &options.accumulation};
    *fields[field] = most;
    is_refused(mxt_trainer_new(model, &options, &no_trainer));
  }
  options = small_options();
  options.batch_size = (size_t)1 << 20; /* legal, but too much memory for this engine */
  mxt_engine_options limited;
  mxt_engine *small = NULL;
  OK(mxt_engine_options_init(&limited, sizeof limited));
  limited.threads = 1;
  limited.memory_limit = 4 << 20;
  OK(mxt_engine_new(&limited, &small));
  other = new_model(small);
  FAILS(MXT_ERROR_OUT_OF_MEMORY, "4194304", mxt_trainer_new(other, &options, &no_trainer));
  mxt_model_free(other);
  mxt_engine_free(small);
  CHECK(no_trainer == NULL);

  /* Numbers that say "as many as there are". */
  options = small_options();
  options.schedule = MXT_SCHEDULE_TRAPEZOID;
  options.warmup_steps = UINT64_MAX - 1;
  options.total_steps = options.decay_steps = UINT64_MAX;
  OK(mxt_trainer_new(model, &options, &no_trainer));
  step(no_trainer, dataset);
  mxt_trainer_free(no_trainer);

  mxt_eval_stats eval;
  eval.struct_size = sizeof eval;
  OK(mxt_trainer_eval(trainer, dataset, most, &eval));
  CHECK(eval.tokens <= DATA);
  mxt_run_options run;
  OK(mxt_run_options_init(&run, sizeof run));
  run.steps = run.eval_every = run.save_every = UINT64_MAX;
  run.eval_batches = most;
  run.eval_dataset = dataset;
  run.on_step = end_run;
  OK(mxt_trainer_run(trainer, dataset, &run, NULL));

  mxt_generate_options generate;
  OK(mxt_generate_options_init(&generate, sizeof generate));
  generate.max_tokens = generate.top_k = most;
  generate.seed = UINT64_MAX;
  generate.on_token = stop_at_once;
  const uint32_t prompt[] = {1, 2, 3};
  uint32_t token = 0;
  size_t written = 0;
  OK(mxt_model_generate(model, &generate, prompt, 3, NULL, 0, &written));
  CHECK(written == 1);
  is_refused(mxt_model_generate(model, &generate, prompt, 3, &token, most, &written));
  is_refused(mxt_model_generate(model, &generate, prompt, most, &token, 1, &written));
  is_refused(mxt_trainer_step_tokens(trainer, prompt, most, NULL));
  is_refused(mxt_dataset_open_files((const char *const *)&run.save_dir, most, &no_dataset));
  CHECK(no_dataset == NULL);
  is_refused(mxt_dataset_read(dataset, 0, most, &token));
  is_refused(mxt_dataset_read(dataset, UINT64_MAX, 1, &token));
  float value = 0;
  const char *name = "transformer.ln_f.weight";
  is_refused(mxt_model_tensor_read(model, name, &value, most));
  is_refused(mxt_model_tensor_write(model, name, &value, most));
  mxt_tensor_info info;
  info.struct_size = sizeof info;
  is_refused(mxt_model_tensor_info(model, most, &info));

  step(trainer, dataset);
  mxt_trainer_free(trainer);
  mxt_dataset_free(dataset);
  mxt_model_free(model);
  mxt_engine_free(engine);
  return 0;
}
