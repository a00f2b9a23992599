/* fork() after use: the child is told so, can free what it inherited and make its own. */
#define _GNU_SOURCE
#include "check.h"

#include <pthread.h>
#include <sys/wait.h>
#include <unistd.h>

static mxt_engine *engine;
static mxt_model *model;
static mxt_trainer *trainer;
static mxt_dataset *dataset;

static void free_all(void) {
  mxt_engine_free(engine);
  mxt_trainer_free(trainer);
  mxt_model_free(model);
  mxt_dataset_free(dataset);
}

/* The loss of a first step with handles of this process. */
static float train_anew(void) {
  mxt_engine *own = new_engine();
  mxt_model *own_model = new_model(own);
  mxt_trainer *own_trainer = new_trainer(own_model);
  mxt_dataset *own_dataset = new_dataset();
  const float loss = step(own_trainer, own_dataset).loss;
  mxt_dataset_free(own_dataset);
  mxt_trainer_free(own_trainer);
  mxt_model_free(own_model);
  mxt_engine_free(own);
  return loss;
}

static void in_child(float first_loss) {
  const mxt_model_config config = small_config();
  mxt_model *other = NULL;
  mxt_run_options run;
  uint32_t token = 1;
  size_t written = 7;
  float values[16];

  FAILS(MXT_ERROR_FORKED, "fork", mxt_trainer_step(trainer, dataset, NULL));
  CHECK(strstr(mxt_trainer_last_error(trainer), "fork") != NULL);
  CHECK(strstr(mxt_engine_last_error(engine), "fork") != NULL);
  FAILS(MXT_ERROR_FORKED, "fork", mxt_model_new(engine, &config, &other));
  FAILS(MXT_ERROR_FORKED, "fork", mxt_model_generate(model, NULL, &token, 1, NULL, 0, &written));
  FAILS(MXT_ERROR_FORKED, "fork",
        mxt_model_tensor_read(model, "transformer.ln_f.bias", values, 16));
  FAILS(MXT_ERROR_FORKED, "fork", mxt_dataset_max_token(dataset, &token));
  OK(mxt_run_options_init(&run, sizeof run));
  run.steps = 1;
  FAILS(MXT_ERROR_FORKED, "fork", mxt_trainer_run(trainer, dataset, &run, NULL));
  CHECK(other == NULL && written == 7 && token == 1);
  /* What never changes can be asked. */
  CHECK(mxt_engine_threads(engine) == 3 && mxt_trainer_steps_done(trainer) == 1);

  CHECK(train_anew() == first_loss);
  free_all();
  CHECK(train_anew() == first_loss);
}

/* The child ends well, and soon. */
static void wait_for(pid_t child) {
  int status = 0;
  CHECK(child > 0 && waitpid(child, &status, 0) == child);
  CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

/* Forks inside of a run; the child's run ends with an error. */
static int32_t fork_once(void *user_data, const mxt_step_stats *stats, const mxt_eval_stats *eval) {
  (void)eval;
  if (stats->step == 3) *(pid_t *)user_data = fork();
  return 0;
}

/* Forks where a window is to be filled; the child's step ends with an error, and not never. */
static int32_t fork_to_fill(void *user_data, uint64_t number, uint32_t *tokens, float *weights,
                            size_t length) {
  pid_t *child = user_data;
  (void)number, (void)weights;
  for (size_t i = 0; i <= length; i++) tokens[i] = (uint32_t)(i % 29);
  if (*child == -1) *child = fork();
  if (*child == 0) alarm(120);
  return 0;
}

static volatile int forking = 1;

static void *keep_training(void *argument) {
  (void)argument;
  while (forking) step(trainer, dataset);
  return NULL;
}

int main(void) {
  mxt_engine_options options;
  pthread_t thread;
  OK(mxt_engine_options_init(&options, sizeof options));
  options.threads = 3;
  OK(mxt_engine_new(&options, &engine));
  model = new_model(engine);
  trainer = new_trainer(model);
  dataset = new_dataset();
  const float first_loss = step(trainer, dataset).loss;

  pid_t child = fork();
  if (child == 0) {
    alarm(120);
    in_child(first_loss);
    _exit(0);
  }
  wait_for(child);
  CHECK(step(trainer, dataset).step == 2); /* the parent goes on */

  mxt_run_options run;
  OK(mxt_run_options_init(&run, sizeof run));
  run.steps = 3;
  run.on_step = fork_once;
  run.user_data = &child;
  child = -1;
  const mxt_status status = mxt_trainer_run(trainer, dataset, &run, NULL);
  if (child == 0) {
    alarm(120);
    RETURNS(MXT_ERROR_FORKED, status);
    free_all();
    _exit(0);
  }
  OK(status);
  wait_for(child);
  CHECK(mxt_trainer_steps_done(trainer) == 5);

  mxt_dataset *windows = NULL;
  child = -1;
  OK(mxt_dataset_from_windows(10, fork_to_fill, &child, NULL, &windows));
  const mxt_status filled = mxt_trainer_step(trainer, windows, NULL);
  if (child == 0) {
    RETURNS(MXT_ERROR_FORKED, filled);
    mxt_dataset_free(windows);
    free_all();
    _exit(0);
  }
  OK(filled);
  wait_for(child);
  mxt_dataset_free(windows);

  /* With another thread deep inside a step, whose locks the child inherits as they are. */
  CHECK(pthread_create(&thread, NULL, keep_training, NULL) == 0);
  for (int i = 0; i < 20; i++) {
    child = fork();
    if (child == 0) {
      alarm(120);
      RETURNS(MXT_ERROR_FORKED, mxt_trainer_set_lr(trainer, 1));
      CHECK(mxt_trainer_last_error(trainer)[0] != 0);
      free_all();
      _exit(0);
    }
    wait_for(child);
  }
  forking = 0;
  CHECK(pthread_join(thread, NULL) == 0);
  free_all();
  return 0;
}
