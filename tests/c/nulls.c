/* NULL for every pointer of every function: an error that names the argument, nothing written. */
#include "check.h"

#define IS_NULL(what, call) FAILS(MXT_ERROR_NULL, what, call)

int main(void) {
  mxt_engine *engine = new_engine(), *no_engine = NULL;
  mxt_model *model = new_model(engine), *no_model = NULL;
  mxt_dataset *dataset = new_dataset(), *no_dataset = NULL;
  mxt_trainer *trainer = new_trainer(model), *no_trainer = NULL;
  const mxt_model_config config = small_config();
  mxt_model_config seen_config;
  mxt_tensor_info info;
  mxt_step_stats stats;
  mxt_eval_stats eval;
  mxt_run_options run;
  mxt_memory_plan plan;
  const uint32_t token = 1;
  uint32_t tokens[8];
  float value = 0;
  size_t written = 77;
  seen_config.struct_size = sizeof seen_config;
  info.struct_size = sizeof info;
  stats.struct_size = sizeof stats;
  eval.struct_size = sizeof eval;
  plan.struct_size = sizeof plan;
  OK(mxt_run_options_init(&run, sizeof run));
  const char *const no_paths[] = {NULL};

  IS_NULL("options", mxt_engine_options_init(NULL, sizeof(mxt_engine_options)));
  IS_NULL("options", mxt_model_config_init(NULL, sizeof(mxt_model_config)));
  IS_NULL("options", mxt_generate_options_init(NULL, sizeof(mxt_generate_options)));
  IS_NULL("options", mxt_trainer_options_init(NULL, sizeof(mxt_trainer_options)));
  IS_NULL("options", mxt_run_options_init(NULL, sizeof(mxt_run_options)));
  IS_NULL("options", mxt_dataset_options_init(NULL, sizeof(mxt_dataset_options)));
  IS_NULL("options", mxt_decoder_options_init(NULL, sizeof(mxt_decoder_options)));

  IS_NULL("engine", mxt_engine_new(NULL, NULL));
  CHECK(mxt_engine_device(NULL) == NULL && mxt_engine_threads(NULL) == 0);
  CHECK(mxt_engine_seed(NULL) == 0);

  IS_NULL("engine", mxt_model_new(NULL, &config, &no_model));
  IS_NULL("config", mxt_model_new(engine, NULL, &no_model));
  CHECK(strstr(mxt_engine_last_error(engine), "config is NULL") != NULL);
  IS_NULL("model", mxt_model_new(engine, &config, NULL));
  IS_NULL("engine", mxt_model_load(NULL, "x", &no_model));
  IS_NULL("dir", mxt_model_load(engine, NULL, &no_model));
  IS_NULL("model", mxt_model_load(engine, "x", NULL));
  IS_NULL("model", mxt_model_save(NULL, "x"));
  IS_NULL("dir", mxt_model_save(model, NULL));
  IS_NULL("model", mxt_model_get_config(NULL, &seen_config));
  IS_NULL("config", mxt_model_get_config(model, NULL));
  CHECK(mxt_model_parameter_count(NULL) == 0 && mxt_model_tensor_count(NULL) == 0);
  IS_NULL("model", mxt_model_tensor_info(NULL, 0, &info));
  IS_NULL("info", mxt_model_tensor_info(model, 0, NULL));
  IS_NULL("model", mxt_model_tensor_read(NULL, "x", &value, 1));
  IS_NULL("name", mxt_model_tensor_read(model, NULL, &value, 1));
  IS_NULL("values", mxt_model_tensor_read(model, "x", NULL, 1));
  IS_NULL("model", mxt_model_tensor_write(NULL, "x", &value, 1));
  IS_NULL("name", mxt_model_tensor_write(model, NULL, &value, 1));
  IS_NULL("values", mxt_model_tensor_write(model, "x", NULL, 1));
  float logit = 0;
  IS_NULL("model", mxt_model_next_logits(NULL, &token, 1, &logit, 1));
  IS_NULL("tokens", mxt_model_next_logits(model, NULL, 1, &logit, 1));
  IS_NULL("logits", mxt_model_next_logits(model, &token, 1, NULL, 1));
  IS_NULL("model", mxt_model_generate(NULL, NULL, &token, 1, NULL, 0, &written));
  IS_NULL("prompt", mxt_model_generate(model, NULL, NULL, 1, NULL, 0, &written));
  IS_NULL("tokens", mxt_model_generate(model, NULL, &token, 1, NULL, 256, &written));
  mxt_generate_options generate;
  OK(mxt_generate_options_init(&generate, sizeof generate));
  generate.stop_token_count = 1;
  IS_NULL("stop_tokens", mxt_model_generate(model, &generate, &token, 1, NULL, 0, &written));
  IS_NULL("written", mxt_model_generate(model, NULL, &token, 1, tokens, 8, NULL));

  mxt_decoder *decoder = NULL;
  IS_NULL("model", mxt_decoder_new(NULL, NULL, &decoder));
  IS_NULL("decoder", mxt_decoder_new(model, NULL, NULL));
  OK(mxt_decoder_new(model, NULL, &decoder));
  IS_NULL("decoder", mxt_decoder_push(NULL, 0, &token, 1));
  IS_NULL("tokens", mxt_decoder_push(decoder, 0, NULL, 1));
  IS_NULL("decoder", mxt_decoder_logits(NULL, 0, &logit, 1));
  IS_NULL("logits", mxt_decoder_logits(decoder, 0, NULL, 1));
  IS_NULL("decoder", mxt_decoder_logits_from(NULL, 0, 0, &logit, 1));
  IS_NULL("logits", mxt_decoder_logits_from(decoder, 0, 0, NULL, 1));
  IS_NULL("decoder", mxt_decoder_generate(NULL, 0, NULL, tokens, 8, &written));
  IS_NULL("tokens", mxt_decoder_generate(decoder, 0, NULL, NULL, 256, &written));
  IS_NULL("written", mxt_decoder_generate(decoder, 0, NULL, tokens, 8, NULL));
  IS_NULL("decoder", mxt_decoder_rewind(NULL, 0, 0));
  IS_NULL("decoder", mxt_decoder_fork(NULL, 0, 0));
  IS_NULL("decoder", mxt_decoder_tokens(NULL, 0, tokens, 8, &written));
  IS_NULL("tokens", mxt_decoder_tokens(decoder, 0, NULL, 8, &written));
  IS_NULL("written", mxt_decoder_tokens(decoder, 0, tokens, 8, NULL));
  CHECK(mxt_decoder_last_error(NULL) != NULL);
  mxt_decoder_free(NULL);
  mxt_decoder_free(decoder);

  IS_NULL("pattern", mxt_dataset_open(NULL, &no_dataset));
  IS_NULL("dataset", mxt_dataset_open("x", NULL));
  IS_NULL("pattern", mxt_dataset_open_with(NULL, NULL, &no_dataset));
  IS_NULL("dataset", mxt_dataset_open_with("x", NULL, NULL));
  IS_NULL("paths[0]", mxt_dataset_open_files_with(no_paths, 1, NULL, &no_dataset));
  IS_NULL("dataset", mxt_dataset_open_files_with(no_paths, 1, NULL, NULL));
  IS_NULL("paths", mxt_dataset_open_files(NULL, 1, &no_dataset));
  IS_NULL("paths[0]", mxt_dataset_open_files(no_paths, 1, &no_dataset));
  IS_NULL("dataset", mxt_dataset_open_files(no_paths, 1, NULL));
  IS_NULL("tokens", mxt_dataset_from_tokens(NULL, 1, &no_dataset));
  IS_NULL("dataset", mxt_dataset_from_tokens(&token, 1, NULL));
  CHECK(mxt_dataset_token_count(NULL) == 0);
  IS_NULL("dataset", mxt_dataset_max_token(NULL, tokens));
  IS_NULL("token", mxt_dataset_max_token(dataset, NULL));
  CHECK(strstr(mxt_dataset_last_error(dataset), "token is NULL") != NULL);
  mxt_coverage coverage;
  coverage.struct_size = sizeof coverage;
  IS_NULL("dataset", mxt_dataset_coverage(NULL, 8, &coverage));
  IS_NULL("coverage", mxt_dataset_coverage(dataset, 8, NULL));
  IS_NULL("dataset", mxt_dataset_read(NULL, 0, 1, tokens));
  IS_NULL("tokens", mxt_dataset_read(dataset, 0, 1, NULL));

  IS_NULL("model", mxt_trainer_new(NULL, NULL, &no_trainer));
  IS_NULL("trainer", mxt_trainer_new(model, NULL, NULL));
  IS_NULL("engine", mxt_trainer_load(NULL, "x", &no_trainer));
  IS_NULL("dir", mxt_trainer_load(engine, NULL, &no_trainer));
  IS_NULL("trainer", mxt_trainer_load(engine, "x", NULL));
  IS_NULL("engine", mxt_trainer_load_as(NULL, "x", "adamw", &no_trainer));
  IS_NULL("dir", mxt_trainer_load_as(engine, NULL, "adamw", &no_trainer));
  IS_NULL("optimizer", mxt_trainer_load_as(engine, "x", NULL, &no_trainer));
  IS_NULL("trainer", mxt_trainer_load_as(engine, "x", "adamw", NULL));
  IS_NULL("trainer", mxt_trainer_save(NULL, "x"));
  IS_NULL("dir", mxt_trainer_save(trainer, NULL));
  IS_NULL("trainer", mxt_trainer_step(NULL, dataset, &stats));
  IS_NULL("dataset", mxt_trainer_step(trainer, NULL, &stats));
  IS_NULL("trainer", mxt_trainer_step_tokens(NULL, tokens, 8, &stats));
  IS_NULL("tokens", mxt_trainer_step_tokens(trainer, NULL, 8, &stats));
  IS_NULL("trainer", mxt_trainer_eval(NULL, dataset, 1, &eval));
  IS_NULL("dataset", mxt_trainer_eval(trainer, NULL, 1, &eval));
  IS_NULL("stats", mxt_trainer_eval(trainer, dataset, 1, NULL));
  IS_NULL("trainer", mxt_trainer_set_sharpness(NULL, 1e-3f));
  mxt_tensor_update update;
  update.struct_size = sizeof update;
  IS_NULL("trainer", mxt_trainer_watch_updates(NULL, 1));
  IS_NULL("trainer", mxt_trainer_tensor_update(NULL, "x", &update));
  IS_NULL("tensor", mxt_trainer_tensor_update(trainer, NULL, &update));
  IS_NULL("update", mxt_trainer_tensor_update(trainer, "x", NULL));
  mxt_weight_metrics metrics;
  metrics.struct_size = sizeof metrics;
  IS_NULL("trainer", mxt_trainer_watch_weights(NULL, 1));
  IS_NULL("trainer", mxt_trainer_weight_metrics(NULL, NULL, &metrics));
  IS_NULL("metrics", mxt_trainer_weight_metrics(trainer, NULL, NULL));
  IS_NULL("trainer", mxt_trainer_set_lr(NULL, 1));
  IS_NULL("trainer", mxt_trainer_use_schedule(NULL));
  IS_NULL("trainer", mxt_trainer_set_schedule(NULL, NULL));
  IS_NULL("options", mxt_trainer_set_schedule(trainer, NULL));
  CHECK(mxt_trainer_schedule_start(NULL) == 0);
  CHECK(mxt_trainer_steps_done(NULL) == 0);
  IS_NULL("trainer", mxt_trainer_model(NULL, &no_model));
  IS_NULL("model", mxt_trainer_model(trainer, NULL));
  IS_NULL("trainer", mxt_trainer_get_options(NULL, NULL));
  IS_NULL("options", mxt_trainer_get_options(trainer, NULL));
  IS_NULL("trainer", mxt_trainer_run(NULL, dataset, &run, NULL));
  IS_NULL("dataset", mxt_trainer_run(trainer, NULL, &run, NULL));
  IS_NULL("options", mxt_trainer_run(trainer, dataset, NULL, NULL));
  CHECK(strstr(mxt_trainer_last_error(trainer), "options is NULL") != NULL);
  mxt_trainer_request_stop(NULL);
  mxt_trainer_clear_stop(NULL);

  IS_NULL("engine", mxt_plan(NULL, &config, NULL, &plan));
  IS_NULL("config", mxt_plan(engine, NULL, NULL, &plan));
  IS_NULL("result", mxt_plan(engine, &config, NULL, NULL));

  CHECK(no_engine == NULL && no_model == NULL && no_dataset == NULL && no_trainer == NULL);
  CHECK(written == 77);
  CHECK(mxt_trainer_steps_done(trainer) == 0);

  /* Asking NULL for its error says where to look. */
  CHECK(strstr(mxt_engine_last_error(NULL), "mxt_last_error") != NULL);
  CHECK(strstr(mxt_model_last_error(NULL), "mxt_last_error") != NULL);
  CHECK(strstr(mxt_dataset_last_error(NULL), "mxt_last_error") != NULL);
  CHECK(strstr(mxt_trainer_last_error(NULL), "mxt_last_error") != NULL);

  mxt_trainer_free(NULL);
  mxt_dataset_free(NULL);
  mxt_model_free(NULL);
  mxt_engine_free(NULL);
  mxt_trainer_free(trainer);
  mxt_dataset_free(dataset);
  mxt_model_free(model);
  mxt_engine_free(engine);
  return 0;
}
