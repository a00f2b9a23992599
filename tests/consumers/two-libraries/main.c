/* Two static libraries with a Rust runtime each in one program. */
#include <mxfp4train.h>

#include <stdint.h>
#include <string.h>

uint32_t other_panics_caught(void);

int main(void) {
  mxt_engine *engine = NULL;
  mxt_model_config config;
  mxt_model *model = NULL;
  if (other_panics_caught() != 2) return 1;
  if (mxt_engine_new(NULL, &engine) != MXT_OK) return 2;
  mxt_model_config_init(&config, sizeof config);
  config.heads = 7;
  if (mxt_model_new(engine, &config, &model) != MXT_ERROR_INVALID_ARGUMENT) return 3;
  if (strstr(mxt_engine_last_error(engine), "heads") == NULL) return 4;
  mxt_engine_free(engine);
  return other_panics_caught() == 2 ? 0 : 5;
}
