/* mxt_trainer_run: callbacks that stop, that call back into the library; signals. */
#define _XOPEN_SOURCE 700
#include "check.h"

#include <pthread.h>
#include <signal.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

struct seen {
  mxt_trainer *trainer;
  const mxt_dataset *dataset;
  const char *folder;
  int steps, evaluations, stop_at;
};

static mxt_trainer *in_training; /* for the signal handler */

static int32_t count(void *user_data, const mxt_step_stats *stats, const mxt_eval_stats *eval) {
  struct seen *it = user_data;
  CHECK(stats->struct_size == sizeof *stats && stats->loss > 0);
  it->steps++;
  if (eval != NULL) {
    CHECK(eval->loss > 0);
    it->evaluations++;
  }
  return it->steps == it->stop_at;
}

/* Everything that a host may want to do between two steps, on the very trainer that calls. */
static int32_t call_back(void *user_data, const mxt_step_stats *stats, const mxt_eval_stats *eval) {
  struct seen *it = user_data;
  mxt_eval_stats own;
  mxt_model *model = NULL;
  uint32_t token = 1;
  size_t written = 0;
  mxt_generate_options generate;
  (void)eval;
  it->steps++;
  own.struct_size = sizeof own;
  OK(mxt_trainer_eval(it->trainer, it->dataset, 1, &own));
  OK(mxt_trainer_set_lr(it->trainer, 1e-3f));
  OK(mxt_trainer_save(it->trainer, it->folder));
  CHECK(mxt_trainer_steps_done(it->trainer) == stats->step);
  OK(mxt_trainer_model(it->trainer, &model));
  OK(mxt_generate_options_init(&generate, sizeof generate));
  generate.max_tokens = 1;
  OK(mxt_model_generate(model, &generate, &token, 1, &token, 1, &written));
  mxt_model_free(model);
  return 0;
}

/* While tokens are sampled the model is in use. */
static int32_t call_back_busy(void *user_data, uint32_t token) {
  mxt_model *model = user_data;
  float weights[16];
  size_t written = 77;
  FAILS(MXT_ERROR_BUSY, "another call",
        mxt_model_tensor_read(model, "transformer.ln_f.weight", weights, 16));
  RETURNS(MXT_ERROR_BUSY, mxt_model_generate(model, NULL, &token, 1, NULL, 0, &written));
  CHECK(written == 77);
  CHECK(mxt_model_tensor_count(model) > 0); /* what never changes can always be asked */
  return 0;
}

static void on_signal(int number) {
  (void)number;
  mxt_trainer_request_stop(in_training);
}

static int32_t raise_at_two(void *user_data, const mxt_step_stats *stats, const mxt_eval_stats *e) {
  (void)e;
  if (++*(int *)user_data == 2) raise(SIGINT);
  CHECK(stats->step > 0);
  return 0;
}

/* The log's warnings. */
static char warnings[4096];

static void keep_warnings(void *user_data, int32_t level, const char *line) {
  (void)user_data;
  if (level != MXT_LOG_LEVEL_WARNING) return;
  strncat(warnings, line, sizeof warnings - strlen(warnings) - 2);
  strcat(warnings, "\n");
}

/* Makes the folder of the checkpoint possible after two steps. */
static int32_t clear_the_way(void *user_data, const mxt_step_stats *stats,
                             const mxt_eval_stats *e) {
  CHECK(e == NULL);
  if (stats->step == 2) CHECK(unlink(user_data) == 0);
  return 0;
}

/* Evaluations and checkpoints that fail do not cost the run; a failed step costs none before it. */
static void side_jobs(const char *root) {
  char folder[4096], blocked[4096];
  snprintf(folder, sizeof folder, "%s/side", root);
  snprintf(blocked, sizeof blocked, "%s/blocked", root);
  mxt_engine_options engine_options;
  mxt_engine *engine = NULL;
  OK(mxt_engine_options_init(&engine_options, sizeof engine_options));
  engine_options.threads = 1;
  engine_options.log = keep_warnings;
  OK(mxt_engine_new(&engine_options, &engine));
  mxt_model *model = new_model(engine);
  mxt_dataset *dataset = new_dataset(), *outside = NULL;
  mxt_trainer *trainer = new_trainer(model), *saved = NULL;
  uint32_t tokens[CONTEXT + 1] = {VOCABULARY};
  OK(mxt_dataset_from_tokens(tokens, CONTEXT + 1, &outside));
  mxt_run_options run;
  mxt_run_result result;
  OK(mxt_run_options_init(&run, sizeof run));
  memset(&result, 0x5a, sizeof result);
  result.struct_size = sizeof result;

  /* No evaluation succeeds: all steps are done and saved, and then the last one's error comes. */
  run.steps = 6;
  run.eval_dataset = outside;
  run.eval_every = 2;
  run.save_dir = folder;
  FAILS(MXT_ERROR_TOKEN_RANGE, "its 6 steps are done and saved",
        mxt_trainer_run(trainer, dataset, &run, &result));
  CHECK(result.steps == 0x5a5a5a5a5a5a5a5a && mxt_trainer_steps_done(trainer) == 6);
  CHECK(strstr(warnings, "the evaluation after step 2 failed: ") != NULL);
  CHECK(strstr(warnings, "the evaluation after step 6 failed: ") != NULL);
  OK(mxt_trainer_load(engine, folder, &saved));
  CHECK(mxt_trainer_steps_done(saved) == 6);
  mxt_trainer_free(saved);

  /* Checkpoints fail until their folder can be made. */
  mxt_trainer_free(trainer);
  trainer = new_trainer(model);
  FILE *file = fopen(blocked, "w");
  CHECK(file != NULL && fclose(file) == 0);
  *warnings = 0;
  run.eval_dataset = NULL;
  run.save_dir = blocked;
  run.save_every = 1;
  run.on_step = clear_the_way;
  run.user_data = blocked;
  run.steps = 4;
  OK(mxt_trainer_run(trainer, dataset, &run, &result));
  CHECK(result.steps == 4 && result.saved == 1 && result.save_errors == 2 &&
        result.eval_errors == 0);
  CHECK(strstr(warnings, "step 1 could not be saved: ") != NULL);
  CHECK(strstr(warnings, "step 3 could not be saved: ") == NULL);

  /* A step that blows up: those before it are saved. */
  mxt_trainer_free(trainer);
  mxt_trainer_options options = small_options();
  options.lr = 1e30f;
  OK(mxt_trainer_new(model, &options, &trainer));
  run.save_every = 0;
  run.on_step = NULL;
  run.steps = 50;
  FAILS(MXT_ERROR_NOT_FINITE, "not finite", mxt_trainer_run(trainer, dataset, &run, &result));
  OK(mxt_trainer_load(engine, blocked, &saved));
  CHECK(mxt_trainer_steps_done(saved) >= 1);
  CHECK(mxt_trainer_steps_done(saved) == mxt_trainer_steps_done(trainer));
  mxt_trainer_free(saved);
  run.save_dir = "/dev/null/x";
  FAILS(MXT_ERROR_NOT_FINITE, "nor could the", mxt_trainer_run(trainer, dataset, &run, &result));

  mxt_trainer_free(trainer);
  mxt_dataset_free(outside);
  mxt_dataset_free(dataset);
  mxt_model_free(model);
  mxt_engine_free(engine);
}

/* Asks a second time while the run that the first request ended saves. */
static void ask_in_log(void *user_data, int32_t level, const char *line) {
  (void)user_data;
  if (level == MXT_LOG_LEVEL_WARNING && strstr(line, "could not be saved") != NULL)
    mxt_trainer_request_stop(in_training);
}

static int32_t ask(void *user_data, const mxt_step_stats *stats, const mxt_eval_stats *e) {
  (void)user_data, (void)e;
  CHECK(stats->step > 0);
  mxt_trainer_request_stop(in_training);
  return 0;
}

static void asks_twice(void) {
  mxt_engine_options options;
  mxt_engine *engine = NULL;
  OK(mxt_engine_options_init(&options, sizeof options));
  options.threads = 1;
  options.log = ask_in_log;
  OK(mxt_engine_new(&options, &engine));
  mxt_model *model = new_model(engine);
  mxt_dataset *dataset = new_dataset();
  mxt_trainer *trainer = new_trainer(model);
  mxt_run_options run;
  mxt_run_result result;
  OK(mxt_run_options_init(&run, sizeof run));
  result.struct_size = sizeof result;
  in_training = trainer;
  run.steps = 3;
  run.save_dir = "/dev/null/x";
  run.on_step = ask;
  RETURNS(MXT_ERROR_IO, mxt_trainer_run(trainer, dataset, &run, &result));
  CHECK(mxt_trainer_steps_done(trainer) == 1);
  run.save_dir = NULL;
  run.on_step = NULL;
  OK(mxt_trainer_run(trainer, dataset, &run, &result));
  CHECK(result.steps == 3 && result.end == MXT_RUN_END_FINISHED);
  mxt_trainer_free(trainer);
  mxt_dataset_free(dataset);
  mxt_model_free(model);
  mxt_engine_free(engine);
}

static int32_t no_evaluation(void *user_data, const mxt_step_stats *stats,
                             const mxt_eval_stats *e) {
  CHECK(stats->step > 0 && e == NULL);
  ++*(int *)user_data;
  return 0;
}

/* Asks for a stop soon after the first step, that is, in the evaluation behind it. */
static void *stop_after_a_step(void *trainer) {
  const struct timespec a_moment = {0, 20000000};
  do nanosleep(&a_moment, NULL);
  while (mxt_trainer_steps_done(trainer) == 0);
  mxt_trainer_request_stop(trainer);
  return NULL;
}

/* A stop request is seen inside an evaluation and inside a step of many batches. */
static void stops_on_the_way(mxt_engine *engine, mxt_model *model, mxt_dataset *dataset,
                             const char *folder) {
  enum { MANY = 2000000 };
  uint32_t *tokens = calloc(MANY, sizeof *tokens);
  mxt_dataset *many = NULL;
  mxt_trainer *trainer = new_trainer(model), *saved = NULL;
  mxt_eval_stats stats;
  mxt_run_options run;
  mxt_run_result result;
  int steps = 0;
  const struct itimerval soon = {{0, 0}, {0, 100000}};
  struct sigaction action;
  CHECK(tokens != NULL);
  OK(mxt_dataset_from_tokens(tokens, MANY, &many));
  free(tokens);
  memset(&action, 0, sizeof action);
  action.sa_handler = on_signal;
  CHECK(sigaction(SIGALRM, &action, NULL) == 0);
  OK(mxt_run_options_init(&run, sizeof run));
  result.struct_size = sizeof result;
  stats.struct_size = sizeof stats;

  in_training = trainer;
  run.steps = 5;
  run.eval_dataset = many;
  run.eval_every = 1;
  run.eval_batches = 0;
  run.save_dir = folder;
  run.on_step = no_evaluation;
  run.user_data = &steps;
  pthread_t stopper;
  CHECK(pthread_create(&stopper, NULL, stop_after_a_step, trainer) == 0);
  OK(mxt_trainer_run(trainer, dataset, &run, &result));
  CHECK(pthread_join(stopper, NULL) == 0);
  CHECK(result.steps == 1 && steps == 1 && result.end == MXT_RUN_END_REQUEST && result.saved == 1);
  CHECK(result.eval_errors == 0 && result.last_eval_loss != result.last_eval_loss);

  /* Outside of a run the request stays until it is taken back. */
  CHECK(setitimer(ITIMER_REAL, &soon, NULL) == 0);
  FAILS(MXT_STOPPED, "stopped", mxt_trainer_eval(trainer, many, 0, &stats));
  RETURNS(MXT_STOPPED, mxt_trainer_eval(trainer, many, 1, &stats));
  mxt_trainer_clear_stop(trainer);
  OK(mxt_trainer_eval(trainer, many, 1, &stats));
  mxt_trainer_free(trainer);

  /* The step that was given up is done again, by whoever goes on. */
  mxt_trainer_options options = small_options();
  options.accumulation = 1 << 14;
  OK(mxt_trainer_new(model, &options, &trainer));
  in_training = trainer;
  run.eval_dataset = NULL;
  CHECK(setitimer(ITIMER_REAL, &soon, NULL) == 0);
  OK(mxt_trainer_run(trainer, dataset, &run, &result));
  CHECK(result.steps == 0 && result.end == MXT_RUN_END_REQUEST && result.saved == 1);
  OK(mxt_trainer_load(engine, folder, &saved));
  CHECK(mxt_trainer_steps_done(saved) == 0);
  mxt_trainer_free(saved);
  mxt_trainer_free(trainer);
  mxt_dataset_free(many);
}

int main(int argc, char **argv) {
  CHECK(argc == 2);
  mxt_engine *engine = new_engine();
  mxt_model *model = new_model(engine);
  mxt_dataset *dataset = new_dataset();
  mxt_trainer *trainer = new_trainer(model);
  const char *folder = in_folder(argv[1], "run");
  mxt_run_options run;
  mxt_run_result result;
  result.struct_size = sizeof result;

  /* No steps, no callback. */
  OK(mxt_run_options_init(&run, sizeof run));
  OK(mxt_trainer_run(trainer, dataset, &run, &result));
  CHECK(result.steps == 0 && result.end == MXT_RUN_END_FINISHED && result.saved == 0);
  CHECK(result.last_loss != result.last_loss);

  /* To the end, with evaluations after steps 3, 6, 9 and 10. */
  struct seen it = {trainer, dataset, folder, 0, 0, 0};
  run.steps = 10;
  run.eval_dataset = dataset;
  run.eval_every = 3;
  run.eval_batches = 2;
  run.save_dir = folder;
  run.save_every = 4;
  run.on_step = count;
  run.user_data = &it;
  OK(mxt_trainer_run(trainer, dataset, &run, &result));
  CHECK(result.steps == 10 && result.end == MXT_RUN_END_FINISHED && result.saved == 1);
  CHECK(result.tokens == 10 * BATCH * CONTEXT && result.seconds > 0);
  CHECK(result.last_loss > 0 && result.last_eval_loss > 0);
  CHECK(it.steps == 10 && it.evaluations == 4);

  /* The callback stops; what it left is saved and goes on. */
  it = (struct seen){trainer, dataset, folder, 0, 0, 3};
  OK(mxt_trainer_run(trainer, dataset, &run, &result));
  CHECK(result.steps == 3 && result.end == MXT_RUN_END_CALLBACK && result.saved == 1);
  mxt_trainer *resumed = NULL;
  OK(mxt_trainer_load(engine, folder, &resumed));
  CHECK(mxt_trainer_steps_done(resumed) == 13);
  CHECK(step(resumed, dataset).loss == step(trainer, dataset).loss);
  mxt_trainer_free(resumed);

  /* The callback calls the library. */
  it = (struct seen){trainer, dataset, folder, 0, 0, 0};
  run.steps = 2;
  run.eval_dataset = NULL;
  run.on_step = call_back;
  OK(mxt_trainer_run(trainer, dataset, &run, &result));
  CHECK(it.steps == 2);
  mxt_generate_options generate;
  size_t written = 0;
  const uint32_t prompt = 1;
  OK(mxt_generate_options_init(&generate, sizeof generate));
  generate.max_tokens = 2;
  generate.on_token = call_back_busy;
  generate.user_data = model;
  OK(mxt_model_generate(model, &generate, &prompt, 1, NULL, 0, &written));
  CHECK(written == 2);

  /* A signal handler stops. */
  struct sigaction action;
  memset(&action, 0, sizeof action);
  action.sa_handler = on_signal;
  CHECK(sigaction(SIGINT, &action, NULL) == 0);
  in_training = trainer;
  int raised = 0;
  run.steps = 100;
  run.on_step = raise_at_two;
  run.user_data = &raised;
  OK(mxt_trainer_run(trainer, dataset, &run, &result));
  CHECK(result.steps == 2 && result.end == MXT_RUN_END_REQUEST && result.saved == 1);

  /* A request before the run counts, once; plain steps take no notice. */
  mxt_trainer_request_stop(trainer);
  step(trainer, dataset);
  OK(mxt_trainer_run(trainer, dataset, &run, &result));
  CHECK(result.steps == 0 && result.end == MXT_RUN_END_REQUEST);
  raised = 2;
  run.steps = 1;
  OK(mxt_trainer_run(trainer, dataset, &run, &result));
  CHECK(result.steps == 1 && result.end == MXT_RUN_END_FINISHED);

  /* Errors: nothing written, the steps before are done. */
  memset(&result, 0x5a, sizeof result);
  result.struct_size = sizeof result;
  run.save_dir = "";
  FAILS(MXT_ERROR_INVALID_ARGUMENT, "save_dir", mxt_trainer_run(trainer, dataset, &run, &result));
  const uint64_t done = mxt_trainer_steps_done(trainer);
  run.save_dir = "/dev/null/x";
  RETURNS(MXT_ERROR_IO, mxt_trainer_run(trainer, dataset, &run, &result));
  CHECK(result.steps == 0x5a5a5a5a5a5a5a5a && mxt_trainer_steps_done(trainer) == done + 1);

  side_jobs(argv[1]);
  asks_twice();
  stops_on_the_way(engine, model, dataset, in_folder(argv[1], "stopped"));

  mxt_trainer_free(trainer);
  mxt_dataset_free(dataset);
  mxt_model_free(model);
  mxt_engine_free(engine);
  return 0;
}
