/* struct_size: uninitialized, of an older program, of a newer one. */
#include "check.h"

/* The size of mxt_model_config in the first header, before models could differ from GPT-2. */
#define FIRST_CONFIG offsetof(mxt_model_config, mlp_channels)

/* A program compiled with a later header, whose config has two more fields. */
typedef struct later_config {
  mxt_model_config known;
  uint64_t later[2];
} later_config;

typedef struct later_stats {
  mxt_step_stats known;
  uint64_t later[2];
} later_stats;

int main(void) {
  mxt_engine *engine = new_engine();
  mxt_model *model = NULL;
  const size_t wrong[] = {0, 1, FIRST_CONFIG - 1, 1025, (size_t)-1};

  for (size_t i = 0; i < sizeof wrong / sizeof wrong[0]; i++) {
    char number[40];
    snprintf(number, sizeof number, "struct_size is %zu", wrong[i]);
    mxt_model_config config = small_config();
    FAILS(MXT_ERROR_STRUCT_SIZE, number, mxt_model_config_init(&config, wrong[i]));
    CHECK(config.vocab_size == VOCABULARY);
    config.struct_size = wrong[i];
    FAILS(MXT_ERROR_STRUCT_SIZE, number, mxt_model_new(engine, &config, &model));
    snprintf(number, sizeof number, "%zu bytes", sizeof(mxt_model_config));
    CHECK(strstr(mxt_last_error(), number) != NULL);
    CHECK(strstr(mxt_engine_last_error(engine), number) != NULL);
    CHECK(model == NULL);
  }

  /* What a program of the first header does not know is GPT-2's, whatever lies behind it. */
  mxt_model_config first;
  memset(&first, 0x5a, sizeof first);
  OK(mxt_model_config_init(&first, FIRST_CONFIG));
  CHECK(first.struct_size == FIRST_CONFIG && first.tied_head == 0x5a5a5a5a);
  first = small_config();
  first.struct_size = FIRST_CONFIG;
  first.mlp_channels = 7, first.activation = 99, first.tied_head = 0;
  OK(mxt_model_new(engine, &first, &model));
  mxt_model_config seen;
  seen.struct_size = sizeof seen;
  OK(mxt_model_get_config(model, &seen));
  CHECK(seen.mlp_channels == 0 && seen.activation == MXT_ACTIVATION_GELU_TANH);
  CHECK(seen.tied_head == 1 && seen.scale_attention == 1 && seen.scale_attention_by_layer == 0);
  mxt_model_free(model);
  model = NULL;

  later_config config;
  memset(&config, 0x5a, sizeof config);
  OK(mxt_model_config_init(&config.known, sizeof config));
  CHECK(config.known.struct_size == sizeof config);
  CHECK(config.later[0] == 0 && config.later[1] == 0);
  config.known = small_config();
  config.known.struct_size = sizeof config;
  config.later[1] = 1;
  FAILS(MXT_ERROR_STRUCT_SIZE, "newer", mxt_model_new(engine, &config.known, &model));
  CHECK(model == NULL);
  config.later[1] = 0;
  OK(mxt_model_new(engine, &config.known, &model));

  mxt_trainer *trainer = new_trainer(model);
  mxt_dataset *dataset = new_dataset();
  later_stats stats;
  memset(&stats, 0x5a, sizeof stats);
  stats.known.struct_size = 3;
  FAILS(MXT_ERROR_STRUCT_SIZE, "stats", mxt_trainer_step(trainer, dataset, &stats.known));
  CHECK(stats.later[0] == 0x5a5a5a5a5a5a5a5a && mxt_trainer_steps_done(trainer) == 0);
  stats.known.struct_size = sizeof stats;
  OK(mxt_trainer_step(trainer, dataset, &stats.known));
  CHECK(stats.known.struct_size == sizeof stats && stats.known.step == 1);
  CHECK(stats.later[0] == 0 && stats.later[1] == 0);

  mxt_trainer_free(trainer);
  mxt_dataset_free(dataset);
  mxt_model_free(model);
  mxt_engine_free(engine);
  return 0;
}
