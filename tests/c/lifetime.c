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

int main(int argc, char **argv) {
  CHECK(argc == 2);
  const char *folder = argv[1];
  mxt_engine *engine = new_engine();
  mxt_model *model = new_model(engine);
  mxt_dataset *dataset = new_dataset();
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
