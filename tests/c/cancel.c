/* pthread_cancel inside of calls: they return, and the thread ends where the host lets it. */
#define _POSIX_C_SOURCE 200809L
#include "check.h"

#include <pthread.h>

static mxt_engine *engine;
static mxt_dataset *dataset;
static mxt_trainer *trainer;
static const char *folder;
static int returned, seen;

static void cancelled(void *(*body)(void *)) {
  pthread_t thread;
  void *result = NULL;
  returned = seen = 0;
  CHECK(pthread_create(&thread, NULL, body, NULL) == 0 && pthread_join(thread, &result) == 0);
  CHECK(result == PTHREAD_CANCELED);
}

/* A cancellation is due before the call, which opens, writes and flushes files. */
static void *save(void *unused) {
  int state = -1;
  CHECK(pthread_cancel(pthread_self()) == 0);
  OK(mxt_trainer_save(trainer, folder));
  CHECK(mxt_trainer_steps_done(trainer) > 0);
  returned = 1;
  CHECK(pthread_setcancelstate(PTHREAD_CANCEL_ENABLE, &state) == 0);
  CHECK(state == PTHREAD_CANCEL_ENABLE);
  pthread_testcancel();
  return unused;
}

/* It comes in a callback, in which it has no effect either. */
static int32_t on_step(void *unused, const mxt_step_stats *stats, const mxt_eval_stats *eval) {
  (void)unused, (void)eval;
  CHECK(stats->step > 0);
  if (++seen == 2) CHECK(pthread_cancel(pthread_self()) == 0);
  pthread_testcancel();
  return 0;
}

static void run_four(void) {
  mxt_run_options run;
  OK(mxt_run_options_init(&run, sizeof run));
  run.steps = 4;
  run.save_dir = folder;
  run.on_step = on_step;
  OK(mxt_trainer_run(trainer, dataset, &run, NULL));
}

static void *run(void *unused) {
  run_four();
  returned = 1;
  pthread_testcancel();
  return unused;
}

/* It may act anywhere: the call ends its work before. */
static void *run_asynchronously(void *unused) {
  int type;
  CHECK(pthread_setcanceltype(PTHREAD_CANCEL_ASYNCHRONOUS, &type) == 0);
  run_four();
  CHECK(pthread_setcanceltype(PTHREAD_CANCEL_DEFERRED, &type) == 0);
  pthread_testcancel();
  return unused;
}

static void usable(uint64_t steps) {
  mxt_trainer *saved = NULL;
  OK(mxt_trainer_load(engine, folder, &saved));
  CHECK(mxt_trainer_steps_done(saved) == steps && mxt_trainer_steps_done(trainer) == steps);
  CHECK(step(saved, dataset).loss == step(trainer, dataset).loss);
  mxt_trainer_free(saved);
}

int main(int argc, char **argv) {
  CHECK(argc == 2);
  folder = argv[1];
  engine = new_engine();
  dataset = new_dataset();
  mxt_model *model = new_model(engine);
  trainer = new_trainer(model);
  step(trainer, dataset);

  cancelled(save);
  CHECK(returned == 1);
  usable(1);
  cancelled(run);
  CHECK(returned == 1 && seen == 4);
  usable(6);
  cancelled(run_asynchronously);
  CHECK(seen == 4);
  usable(11);

  mxt_trainer_free(trainer);
  mxt_model_free(model);
  mxt_dataset_free(dataset);
  mxt_engine_free(engine);
  return 0;
}
