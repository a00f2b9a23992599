// examples/c/ten_lines.c
#include <mxfp4train.h>
#include <stdio.h>

int main(void) {
  mxt_engine *engine = 0; mxt_dataset *data = 0; mxt_model *model = 0; mxt_trainer *trainer = 0;
  mxt_model_config shape; mxt_step_stats stats = {.struct_size = sizeof stats};
  mxt_model_config_init(&shape, sizeof shape);  // GPT-2 small (124M), made smaller:
  shape.vocab_size = 256, shape.context_length = 64, shape.layers = 2, shape.channels = 96;
  int failed = mxt_dataset_open("data/train.bin", &data) || mxt_engine_new(NULL, &engine) ||
               mxt_model_new(engine, &shape, &model) || mxt_trainer_new(model, NULL, &trainer);
  while (!failed && stats.step < 100 && !(failed = mxt_trainer_step(trainer, data, &stats) != 0))
    printf("loss %.3f\n", stats.loss);
  if (failed || mxt_trainer_save(trainer, "out")) return puts(mxt_last_error()), 1;
  mxt_trainer_free(trainer), mxt_model_free(model), mxt_dataset_free(data), mxt_engine_free(engine);
}
