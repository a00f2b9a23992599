/* Values that no call can use: each its own error, with a message, and outputs left alone. */
#include "check.h"

static void set_float(float *field, float value) { *field = value; }

int main(int argc, char **argv) {
  CHECK(argc == 2);
  const char *folder = argv[1];
  mxt_engine *engine = new_engine();
  mxt_model *model = new_model(engine);
  mxt_trainer *trainer = new_trainer(model);
  mxt_dataset *dataset = new_dataset();
  float nan = 0;
  memset(&nan, 0xff, sizeof nan);

  /* engine */
  mxt_engine *other_engine = NULL;
  mxt_engine_options engine_options;
  OK(mxt_engine_options_init(&engine_options, sizeof engine_options));
  CHECK(engine_options.device == NULL && engine_options.log == NULL);
  engine_options.device = "abacus";
  FAILS(MXT_ERROR_INVALID_ARGUMENT, "abacus", mxt_engine_new(&engine_options, &other_engine));
  engine_options.device = "cp\xfc";
  FAILS(MXT_ERROR_UTF8, "0xfc at offset 2", mxt_engine_new(&engine_options, &other_engine));
  engine_options.device = "cpu";
  engine_options.threads = 100000;
  FAILS(MXT_ERROR_INVALID_ARGUMENT, "threads", mxt_engine_new(&engine_options, &other_engine));
  CHECK(other_engine == NULL);
  CHECK(strcmp(mxt_engine_device(engine), "cpu") == 0 && mxt_engine_threads(engine) == 1);

  /* model */
  mxt_model *other = NULL;
  mxt_model_config config = small_config();
  config.architecture = 7;
  FAILS(MXT_ERROR_INVALID_ARGUMENT, "architecture", mxt_model_new(engine, &config, &other));
  config = small_config();
  config.activation = 2;
  FAILS(MXT_ERROR_INVALID_ARGUMENT, "activation", mxt_model_new(engine, &config, &other));
  config = small_config();
  config.tied_head = 2;
  FAILS(MXT_ERROR_INVALID_ARGUMENT, "tied_head", mxt_model_new(engine, &config, &other));
  config = small_config();
  config.scale_attention = -1;
  FAILS(MXT_ERROR_INVALID_ARGUMENT, "scale_attention", mxt_model_new(engine, &config, &other));
  config = small_config();
  config.mlp_channels = (size_t)-1;
  FAILS(MXT_ERROR_INVALID_ARGUMENT, "mlp_channels", mxt_model_new(engine, &config, &other));
  config = small_config();
  config.heads = 3;
  FAILS(MXT_ERROR_INVALID_ARGUMENT, "heads", mxt_model_new(engine, &config, &other));
  config = small_config();
  config.vocab_size = 0;
  FAILS(MXT_ERROR_INVALID_ARGUMENT, "vocab_size", mxt_model_new(engine, &config, &other));
  FAILS(MXT_ERROR_IO, "cannot open",
        mxt_model_load(engine, "\xff", &other)); /* no UTF-8, but a path */
  FAILS(MXT_ERROR_INVALID_ARGUMENT, "empty", mxt_model_load(engine, "", &other));
  FAILS(MXT_ERROR_IO, "nowhere", mxt_model_load(engine, in_folder(folder, "nowhere"), &other));
  CHECK(other == NULL);

  mxt_tensor_info info;
  memset(&info, 0x5a, sizeof info);
  info.struct_size = sizeof info;
  const size_t tensors = mxt_model_tensor_count(model);
  FAILS(MXT_ERROR_INVALID_ARGUMENT, "index", mxt_model_tensor_info(model, tensors, &info));
  CHECK(info.rank == 0x5a5a5a5a);
  float values[4] = {1, 2, 3, 4};
  FAILS(MXT_ERROR_NO_SUCH_TENSOR, "\"x\"", mxt_model_tensor_read(model, "x", values, 4));
  const char *name = "transformer.ln_f.weight";
  RETURNS(MXT_ERROR_INVALID_ARGUMENT, mxt_model_tensor_read(model, name, values, 4));
  RETURNS(MXT_ERROR_INVALID_ARGUMENT, mxt_model_tensor_write(model, name, values, 4));
  CHECK(values[0] == 1 && values[3] == 4);
  float *odd = (float *)(void *)((char *)values + 1);
  FAILS(MXT_ERROR_INVALID_ARGUMENT, "address", mxt_model_tensor_read(model, name, odd, 1));

  /* generate */
  mxt_generate_options generate;
  OK(mxt_generate_options_init(&generate, sizeof generate));
  uint32_t tokens[8] = {5, 5, 5, 5, 5, 5, 5, 5};
  const uint32_t prompt[] = {1, 2}, outside[] = {1, VOCABULARY};
  size_t written = 77;
  generate.max_tokens = 9;
  FAILS(MXT_ERROR_BUFFER_TOO_SMALL, "9",
        mxt_model_generate(model, &generate, prompt, 2, tokens, 8, &written));
  generate.max_tokens = 8;
  RETURNS(MXT_ERROR_INVALID_ARGUMENT,
          mxt_model_generate(model, &generate, NULL, 0, tokens, 8, &written));
  FAILS(MXT_ERROR_TOKEN_RANGE, "32",
        mxt_model_generate(model, &generate, outside, 2, tokens, 8, &written));
  generate.stop_tokens = outside;
  generate.stop_token_count = 2;
  FAILS(MXT_ERROR_INVALID_ARGUMENT, "stop_tokens",
        mxt_model_generate(model, &generate, prompt, 2, tokens, 8, &written));
  generate.stop_token_count = 0;
  set_float(&generate.temperature, -1);
  FAILS(MXT_ERROR_INVALID_ARGUMENT, "temperature",
        mxt_model_generate(model, &generate, prompt, 2, tokens, 8, &written));
  set_float(&generate.temperature, 0);
  generate.weights = 3;
  FAILS(MXT_ERROR_INVALID_ARGUMENT, "MXT_DECODER_WEIGHTS_MXFP4",
        mxt_model_generate(model, &generate, prompt, 2, tokens, 8, &written));
  generate.weights = MXT_DECODER_WEIGHTS_MXFP4;
  generate.slide = 2;
  FAILS(MXT_ERROR_INVALID_ARGUMENT, "slide",
        mxt_model_generate(model, &generate, prompt, 2, tokens, 8, &written));
  generate.slide = 1;
  set_float(&generate.min_p, -1);
  FAILS(MXT_ERROR_INVALID_ARGUMENT, "min_p",
        mxt_model_generate(model, &generate, prompt, 2, tokens, 8, &written));
  CHECK(written == 77 && tokens[0] == 5);

  /* dataset */
  mxt_dataset *other_data = NULL;
  RETURNS(MXT_ERROR_IO, mxt_dataset_open(in_folder(folder, "nothing.bin"), &other_data));
  CHECK(strstr(mxt_last_error(), "nothing.bin") != NULL);
  RETURNS(MXT_ERROR_INVALID_ARGUMENT, mxt_dataset_open_files(NULL, 0, &other_data));
  RETURNS(MXT_ERROR_INVALID_ARGUMENT, mxt_dataset_from_tokens(NULL, 0, &other_data));
  FAILS(MXT_ERROR_INVALID_ARGUMENT, "memory",
        mxt_dataset_from_tokens(tokens, (size_t)-1, &other_data));
  CHECK(other_data == NULL);
  mxt_dataset_options data_options;
  OK(mxt_dataset_options_init(&data_options, sizeof data_options));
  CHECK(data_options.token_type == MXT_TOKEN_TYPE_AUTO);
  data_options.token_type = 6;
  FAILS(MXT_ERROR_INVALID_ARGUMENT, "token_type",
        mxt_dataset_open_with("x", &data_options, &other_data));
  data_options.token_type = MXT_TOKEN_TYPE_U32;
  data_options.reserved = 1;
  FAILS(MXT_ERROR_INVALID_ARGUMENT, "reserved",
        mxt_dataset_open_with("x", &data_options, &other_data));
  data_options.reserved = 0;
  data_options.struct_size = 8;
  FAILS(MXT_ERROR_STRUCT_SIZE, "options", mxt_dataset_open_with("x", &data_options, &other_data));
  data_options.struct_size = sizeof data_options;
  CHECK(other_data == NULL);

  /* Three tokens of 32 bits, in a file whose name is not UTF-8. */
  const uint32_t wide[3] = {1, 70000, 3};
  const char *wide_path = in_folder(folder, "wide-\xfc.bin");
  const char *const wide_paths[] = {wide_path};
  FILE *wide_file = fopen(wide_path, "wb");
  CHECK(wide_file != NULL && fwrite(wide, 4, 3, wide_file) == 3 && fclose(wide_file) == 0);
  OK(mxt_dataset_open(wide_path, &other_data));
  CHECK(mxt_dataset_token_count(other_data) == 6); /* so few may be anything */
  mxt_dataset_free(other_data);
  OK(mxt_dataset_open_with(wide_path, &data_options, &other_data));
  CHECK(mxt_dataset_token_count(other_data) == 3);
  mxt_dataset_free(other_data);
  OK(mxt_dataset_open_files_with(wide_paths, 1, &data_options, &other_data));
  mxt_coverage coverage;
  coverage.struct_size = sizeof coverage;
  OK(mxt_dataset_coverage(other_data, 8, &coverage));
  CHECK(coverage.files == 1 && coverage.short_files == 1 && coverage.short_tokens == 3);
  CHECK(coverage.windows == 0 && coverage.longest == 3);
  FAILS(MXT_ERROR_TOKEN_RANGE, "token 70000 at offset 1",
        mxt_trainer_step(trainer, other_data, NULL));
  mxt_dataset_free(other_data);
  other_data = NULL;

  uint32_t largest = 0;
  OK(mxt_dataset_max_token(dataset, &largest));
  CHECK(largest == 28 && mxt_dataset_token_count(dataset) == DATA);
  uint32_t read[3] = {77, 77, 77};
  OK(mxt_dataset_read(dataset, DATA, 0, NULL));
  FAILS(MXT_ERROR_INVALID_ARGUMENT, "the dataset has",
        mxt_dataset_read(dataset, DATA - 2, 3, read));
  CHECK(read[0] == 77 && read[2] == 77);

  /* trainer */
  mxt_trainer *no_trainer = NULL;
  mxt_trainer_options options = small_options();
  options.schedule = 4;
  FAILS(MXT_ERROR_INVALID_ARGUMENT, "got 4", mxt_trainer_new(model, &options, &no_trainer));
  CHECK(strstr(mxt_model_last_error(model), "schedule") != NULL);
  options.schedule = -1;
  FAILS(MXT_ERROR_INVALID_ARGUMENT, "schedule", mxt_trainer_new(model, &options, &no_trainer));
  options.schedule = MXT_SCHEDULE_COSINE; /* without total_steps */
  FAILS(MXT_ERROR_INVALID_ARGUMENT, "total_steps", mxt_trainer_new(model, &options, &no_trainer));
  options = small_options();
  options.recipe = "mxfp5";
  FAILS(MXT_ERROR_INVALID_ARGUMENT, "mxfp5", mxt_trainer_new(model, &options, &no_trainer));
  options.recipe = NULL;
  options.recompute = "everything";
  FAILS(MXT_ERROR_INVALID_ARGUMENT, "pointwise", mxt_trainer_new(model, &options, &no_trainer));
  options.recompute = "block";
  options.optimizer = "adam";
  FAILS(MXT_ERROR_INVALID_ARGUMENT, "optimizer: expected one of adamw, stable-adamw, ",
        mxt_trainer_new(model, &options, &no_trainer));
  options.optimizer = "adamw,fast=1";
  FAILS(MXT_ERROR_INVALID_ARGUMENT, "unknown switch \"fast\"",
        mxt_trainer_new(model, &options, &no_trainer));
  options.optimizer = "\xf0\x28";
  FAILS(MXT_ERROR_UTF8, "optimizer", mxt_trainer_new(model, &options, &no_trainer));
  options.optimizer = NULL;
  options.token_drop = "start=8,steps=2";
  FAILS(MXT_ERROR_INVALID_ARGUMENT, "start: expected a multiple of 16 tokens, got \"8\"",
        mxt_trainer_new(model, &options, &no_trainer));
  options.token_drop = "start=16,steps=2";
  FAILS(MXT_ERROR_INVALID_ARGUMENT, "token_drop: blocks between the first and the last",
        mxt_trainer_new(model, &options, &no_trainer));
  options.token_drop = "\xf0\x28";
  FAILS(MXT_ERROR_UTF8, "token_drop", mxt_trainer_new(model, &options, &no_trainer));
  options.token_drop = NULL;
  options.recipe = "\xf0\x28";
  FAILS(MXT_ERROR_UTF8, "recipe", mxt_trainer_new(model, &options, &no_trainer));
  options = small_options();
  options.sequence_length = CONTEXT + 1;
  FAILS(MXT_ERROR_INVALID_ARGUMENT, "17", mxt_trainer_new(model, &options, &no_trainer));
  options = small_options();
  options.batch_size = 0;
  FAILS(MXT_ERROR_INVALID_ARGUMENT, "batch_size", mxt_trainer_new(model, &options, &no_trainer));
  options = small_options();
  set_float(&options.beta1, nan);
  FAILS(MXT_ERROR_INVALID_ARGUMENT, "beta1", mxt_trainer_new(model, &options, &no_trainer));
  FAILS(MXT_ERROR_IO, "nowhere",
        mxt_trainer_load(engine, in_folder(folder, "nowhere"), &no_trainer));
  CHECK(no_trainer == NULL);

  mxt_step_stats stats;
  memset(&stats, 0x5a, sizeof stats);
  stats.struct_size = sizeof stats;
  RETURNS(MXT_ERROR_INVALID_ARGUMENT, mxt_trainer_step_tokens(trainer, tokens, 8, &stats));
  uint32_t rows[BATCH * (CONTEXT + 1)] = {0};
  rows[20] = VOCABULARY;
  FAILS(MXT_ERROR_TOKEN_RANGE, "20",
        mxt_trainer_step_tokens(trainer, rows, BATCH * (CONTEXT + 1), &stats));
  OK(mxt_dataset_from_tokens(tokens, 8, &other_data));
  RETURNS(MXT_ERROR_INVALID_ARGUMENT, mxt_trainer_step(trainer, other_data, &stats));
  CHECK(stats.step == 0x5a5a5a5a5a5a5a5a && mxt_trainer_steps_done(trainer) == 0);
  RETURNS(MXT_ERROR_INVALID_ARGUMENT, mxt_trainer_set_sharpness(trainer, 2));
  RETURNS(MXT_ERROR_INVALID_ARGUMENT, mxt_trainer_set_sharpness(trainer, nan));
  RETURNS(MXT_ERROR_INVALID_ARGUMENT, mxt_trainer_set_lr(trainer, -1));
  RETURNS(MXT_ERROR_INVALID_ARGUMENT, mxt_trainer_set_lr(trainer, nan));
  CHECK(strstr(mxt_trainer_last_error(trainer), "lr") != NULL);
  mxt_trainer_options schedule;
  OK(mxt_trainer_options_init(&schedule, sizeof schedule));
  schedule.schedule = 4;
  FAILS(MXT_ERROR_INVALID_ARGUMENT, "schedule", mxt_trainer_set_schedule(trainer, &schedule));
  schedule.schedule = MXT_SCHEDULE_COSINE; /* total_steps is 0 */
  FAILS(MXT_ERROR_INVALID_ARGUMENT, "total_steps", mxt_trainer_set_schedule(trainer, &schedule));
  OK(mxt_trainer_get_options(trainer, &schedule));
  CHECK(schedule.schedule == MXT_SCHEDULE_CONSTANT);

  /* A file where a folder should be. */
  FILE *file = fopen(in_folder(folder, "file"), "w");
  CHECK(file != NULL && fclose(file) == 0);
  RETURNS(MXT_ERROR_IO, mxt_trainer_save(trainer, in_folder(folder, "file/checkpoint")));
  RETURNS(MXT_ERROR_IO, mxt_model_save(model, in_folder(folder, "file/checkpoint")));

  /* Nothing of all this did harm. */
  rows[20] = 0;
  OK(mxt_trainer_step_tokens(trainer, rows, BATCH * (CONTEXT + 1), &stats));
  CHECK(stats.step == 1);

  mxt_dataset_free(other_data);
  mxt_dataset_free(dataset);
  mxt_trainer_free(trainer);
  mxt_model_free(model);
  mxt_engine_free(engine);
  return 0;
}
