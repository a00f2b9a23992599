/* mxt_trainer_run: callbacks that stop, that call back into the library; signals. */
#define _POSIX_C_SOURCE 200809L
#include "check.h"

#include <signal.h>

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

  mxt_trainer_free(trainer);
  mxt_dataset_free(dataset);
  mxt_model_free(model);
  mxt_engine_free(engine);
  return 0;
}
