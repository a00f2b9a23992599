// A C++ exception thrown by the callback of a run arrives at the host's handler, and the trainer
// goes on where it was.
#include "check.h"

#include <pthread.h>
#include <stdexcept>

int main() {
  mxt_engine *engine = new_engine();
  mxt_model *model = new_model(engine);
  mxt_dataset *dataset = new_dataset();
  mxt_trainer *trainer = new_trainer(model);
  mxt_run_options run;
  OK(mxt_run_options_init(&run, sizeof run));
  run.steps = 10;
  run.on_step = [](void *, const mxt_step_stats *stats, const mxt_eval_stats *) -> int32_t {
    if (stats->step == 2) throw std::runtime_error("enough");
    return 0;
  };
  bool caught = false;
  try {
    mxt_trainer_run(trainer, dataset, &run, nullptr);
  } catch (const std::runtime_error &error) {
    caught = strcmp(error.what(), "enough") == 0;
  }
  CHECK(caught);
  // The host's thread can be cancelled again.
  int state = -1;
  CHECK(pthread_setcancelstate(PTHREAD_CANCEL_ENABLE, &state) == 0);
  CHECK(state == PTHREAD_CANCEL_ENABLE);
  CHECK(mxt_trainer_steps_done(trainer) == 2);
  CHECK(step(trainer, dataset).step == 3);
  run.on_step = nullptr;
  OK(mxt_trainer_run(trainer, dataset, &run, nullptr));
  CHECK(mxt_trainer_steps_done(trainer) == 13);

  mxt_trainer_free(trainer);
  mxt_dataset_free(dataset);
  mxt_model_free(model);
  mxt_engine_free(engine);
  return 0;
}
