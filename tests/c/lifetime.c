/* Parents freed before children, handles freed inside callbacks, several handles on one model. */
#include "check.h"

struct freeing {
  mxt_trainer *trainer;
  mxt_dataset *dataset;
  int calls;
};

static int32_t free_all(void *user_data, const mxt_step_stats *seen, const mxt_eval_stats *eval) {
  struct freeing *it = user_data;
  CHECK(seen->step == 1 && eval == NULL);
  it->calls++;
  mxt_trainer_free(it->trainer);
  mxt_dataset_free(it->dataset);
  return 0;
}

struct log {
  int lines, freed, lines_when_freed;
};

static void on_log(void *user_data, int32_t level, const char *message) {
  struct log *it = user_data;
  CHECK(level != 0 && message[0] != 0 && it->freed == 0);
  it->lines++;
}

static void free_log(void *user_data) {
  struct log *it = user_data;
  it->lines_when_freed = it->lines;
  it->freed++;
}

struct last {
  mxt_trainer *trainer;
  struct log *log;
};

static int32_t free_the_last(void *user_data, const mxt_step_stats *seen,
                             const mxt_eval_stats *eval) {
  struct last *it = user_data;
  CHECK(seen != NULL && eval == NULL);
  mxt_trainer_free(it->trainer);
  CHECK(it->log->freed == 0);
  return 0;
}

/* The log's user data is given back once, with the last that could log, and never on a failure. */
static void log_user_data(const mxt_dataset *dataset) {
  struct log log = {0, 0, 0};
  mxt_engine *engine = NULL;
  mxt_engine_options options;
  OK(mxt_engine_options_init(&options, sizeof options));
  CHECK(options.log_user_data_free == NULL);
  options.threads = 2;
  options.log = on_log;
  options.log_user_data = &log;
  options.log_user_data_free = free_log;

  options.device = "abacus";
  FAILS(MXT_ERROR_INVALID_ARGUMENT, "abacus", mxt_engine_new(&options, &engine));
  options.device = NULL;
  RETURNS(MXT_ERROR_NULL, mxt_engine_new(&options, NULL));
  CHECK(log.freed == 0);

  OK(mxt_engine_new(&options, &engine));
  mxt_model *model = new_model(engine);
  mxt_engine_free(engine);
  mxt_trainer *trainer = new_trainer(model);
  mxt_model_free(model);
  CHECK(log.freed == 0 && log.lines > 0);
  mxt_trainer_free(trainer);
  CHECK(log.freed == 1 && log.lines == log.lines_when_freed);

  /* The last handle is freed by a callback of its own call, which goes on and may log. */
  log.freed = 0;
  OK(mxt_engine_new(&options, &engine));
  model = new_model(engine);
  trainer = new_trainer(model);
  mxt_engine_free(engine);
  mxt_model_free(model);
  struct last last = {trainer, &log};
  mxt_run_options run;
  mxt_run_result result;
  OK(mxt_run_options_init(&run, sizeof run));
  run.steps = 5;
  run.on_step = free_the_last;
  run.user_data = &last;
  result.struct_size = sizeof result;
  OK(mxt_trainer_run(trainer, dataset, &run, &result));
  CHECK(log.freed == 1);

  /* Nothing will ever log without a function; a program of before the field has nothing freed. */
  log.freed = 0;
  options.log = NULL;
  OK(mxt_engine_new(&options, &engine));
  CHECK(log.freed == 1);
  mxt_engine_free(engine);
  CHECK(log.freed == 1);
  options.struct_size = offsetof(mxt_engine_options, log_user_data_free);
  OK(mxt_engine_new(&options, &engine));
  mxt_engine_free(engine);
  CHECK(log.freed == 1);
}

static void count_free(void *user_data) { ++*(int *)user_data; }

static int32_t copy_alone(void *user_data, const void *send, void *receive, size_t bytes) {
  (void)user_data;
  memcpy(receive, send, bytes);
  return 0;
}

/* So is a group's: of one rank at once, whether or not there are functions. */
static void group_user_data(void) {
  mxt_engine_options options;
  mxt_group group;
  mxt_engine *engine = NULL;
  int freed = 0;
  OK(mxt_engine_options_init(&options, sizeof options));
  OK(mxt_group_init(&group, sizeof group));
  options.threads = 1;
  options.group = &group;
  group.user_data = &freed;
  group.user_data_free = count_free;
  for (int has_functions = 0; has_functions < 2; has_functions++) {
    options.device = "abacus";
    FAILS(MXT_ERROR_INVALID_ARGUMENT, "abacus", mxt_engine_new(&options, &engine));
    CHECK(freed == has_functions);
    options.device = NULL;
    OK(mxt_engine_new(&options, &engine));
    CHECK(freed == has_functions + 1);
    mxt_engine_free(engine);
    CHECK(freed == has_functions + 1);
    group.all_to_all = copy_alone;
    group.all_gather = copy_alone;
  }
}

/* And those of datasets: with the last call that uses one. */
static int32_t fill_zeros(void *user_data, uint64_t number, uint32_t *to, float *weights,
                          size_t length) {
  (void)user_data, (void)number, (void)weights;
  memset(to, 0, (length + 1) * sizeof *to);
  return 0;
}

static void dataset_user_data(void) {
  static const uint16_t tokens[] = {1, 2, 3};
  mxt_dataset *dataset = NULL;
  int freed = 0;
  FAILS(MXT_ERROR_INVALID_ARGUMENT, "token_type",
        mxt_dataset_from_memory(tokens, 3, 77, &freed, count_free, &dataset));
  RETURNS(MXT_ERROR_NULL, mxt_dataset_from_windows(3, NULL, &freed, count_free, &dataset));
  CHECK(freed == 0);
  OK(mxt_dataset_from_memory(tokens, 3, MXT_TOKEN_TYPE_U16, &freed, count_free, &dataset));
  CHECK(freed == 0);
  mxt_dataset_free(dataset);
  CHECK(freed == 1);
  OK(mxt_dataset_from_windows(3, fill_zeros, &freed, count_free, &dataset));
  CHECK(freed == 1);
  mxt_dataset_free(dataset);
  CHECK(freed == 2);
}

int main(int argc, char **argv) {
  CHECK(argc == 2);
  const char *folder = argv[1];
  mxt_engine *engine = new_engine();
  mxt_model *model = new_model(engine);
  mxt_dataset *dataset = new_dataset();
  log_user_data(dataset);
  group_user_data();
  dataset_user_data();
  mxt_trainer *trainer = new_trainer(model);

  /* The trainer outlives engine and model. */
  mxt_engine_free(engine);
  mxt_model_free(model);
  const float first = step(trainer, dataset).loss;
  CHECK(step(trainer, dataset).step == 2);
  CHECK(first > 0);

  /* Two handles are one model, and it outlives the trainer. */
  mxt_model *one = NULL, *two = NULL;
  OK(mxt_trainer_model(trainer, &one));
  OK(mxt_trainer_model(trainer, &two));
  float weights[16], seen[16];
  for (int i = 0; i < 16; i++) weights[i] = 0.5f + (float)i;
  OK(mxt_model_tensor_write(one, "transformer.ln_f.weight", weights, 16));
  OK(mxt_model_tensor_read(two, "transformer.ln_f.weight", seen, 16));
  CHECK(memcmp(weights, seen, sizeof seen) == 0);
  step(trainer, dataset);
  mxt_trainer_free(trainer);
  mxt_model_free(two);
  OK(mxt_model_save(one, in_folder(folder, "model")));
  for (int32_t stored = MXT_STORED_WEIGHTS_F32; stored <= MXT_STORED_WEIGHTS_MXFP4; stored++) {
    mxt_engine *other = new_engine();
    mxt_model *smaller = NULL;
    OK(mxt_model_save_as(one, in_folder(folder, "smaller"), stored));
    OK(mxt_model_load(other, in_folder(folder, "smaller"), &smaller));
    mxt_engine_free(other);
    OK(mxt_model_tensor_read(smaller, "transformer.ln_f.weight", seen, 16));
    OK(mxt_model_tensor_read(one, "transformer.ln_f.weight", weights, 16));
    const float bound = stored == MXT_STORED_WEIGHTS_F32 ? 0 : 1.0f / 256;
    for (int i = 0; i < 16; i++) {
      const float off = seen[i] - weights[i];
      CHECK(off <= bound * weights[i] && -off <= bound * weights[i]);
    }
    mxt_model_free(smaller);
  }
  FAILS(MXT_ERROR_INVALID_ARGUMENT, "MXT_STORED_WEIGHTS_F32 (0)",
        mxt_model_save_as(one, in_folder(folder, "smaller"), 4));
  FAILS(MXT_ERROR_INVALID_ARGUMENT, "got -1",
        mxt_model_save_as(one, in_folder(folder, "smaller"), -1));

  /* Names are borrowed from the handle that was asked. */
  mxt_tensor_info info;
  info.struct_size = sizeof info;
  OK(mxt_model_tensor_info(one, 0, &info));
  CHECK(strlen(info.name) > 0);

  /* A second trainer of the same model, and one that is freed by its own callback. */
  trainer = new_trainer(one);
  mxt_model_free(one);
  struct freeing it = {trainer, dataset, 0};
  mxt_run_options run;
  mxt_run_result result;
  OK(mxt_run_options_init(&run, sizeof run));
  run.steps = 100;
  run.save_dir = in_folder(folder, "last");
  run.on_step = free_all;
  run.user_data = &it;
  result.struct_size = sizeof result;
  OK(mxt_trainer_run(trainer, dataset, &run, &result));
  CHECK(it.calls == 1 && result.steps == 1 && result.end == MXT_RUN_END_REQUEST);
  CHECK(result.saved == 1);
  return 0;
}
