/* Adapters: trained beside weights that stay, saved, loaded, merged; frozen tensors; and hosts that
   ask for what cannot be. */
#include "check.h"

#include <math.h>
#include <stdint.h>

static const char *const QKV = "transformer.h.0.attn.c_attn.weight";
static const char *const A = "transformer.h.0.attn.c_attn.lora_A.weight";
static const char *const B = "transformer.h.0.attn.c_attn.lora_B.weight";

enum { RANK = 3, QKV_COUNT = 16 * 48, A_COUNT = RANK * 16, B_COUNT = 48 * RANK };

static float before[QKV_COUNT], after[QKV_COUNT];

static void adapters(const mxt_engine *engine, const mxt_dataset *dataset, const char *folder) {
  mxt_model *base = new_model(engine), *adapted = NULL, *again = NULL, *merged = NULL;
  const uint32_t layers = MXT_LORA_LAYER_ATTN_C_ATTN | MXT_LORA_LAYER_MLP_C_FC;
  OK(mxt_model_with_lora(base, RANK, 0.0f, layers, &adapted));
  mxt_model_config config;
  config.struct_size = sizeof config;
  OK(mxt_model_get_config(adapted, &config));
  CHECK(config.lora_rank == RANK && config.lora_alpha == 6.0f && config.lora_layers == layers);
  OK(mxt_model_get_config(base, &config));
  CHECK(config.lora_rank == 0 && config.lora_alpha == 0.0f && config.lora_layers == 0);
  CHECK(mxt_model_tensor_count(adapted) == mxt_model_tensor_count(base) + 4);
  CHECK(mxt_model_parameter_count(adapted) ==
        mxt_model_parameter_count(base) + RANK * (16 + 48 + 16 + 64));

  mxt_trainer *trainer = new_trainer(adapted);
  float gradient[QKV_COUNT];
  for (int i = 0; i < 5; i++) step(trainer, dataset);
  FAILS(MXT_ERROR_INVALID_ARGUMENT, "frozen",
        mxt_trainer_read_gradient(trainer, QKV, gradient, QKV_COUNT));
  OK(mxt_trainer_read_gradient(trainer, A, gradient, A_COUNT));
  int32_t is_trained = 7;
  OK(mxt_trainer_is_trained(trainer, A, &is_trained));
  CHECK(is_trained == 1);
  OK(mxt_trainer_is_trained(trainer, QKV, &is_trained));
  CHECK(is_trained == 0);
  FAILS(MXT_ERROR_NO_SUCH_TENSOR, "no.such",
        mxt_trainer_is_trained(trainer, "no.such", &is_trained));
  OK(mxt_model_tensor_read(base, QKV, before, QKV_COUNT));
  OK(mxt_model_tensor_read(adapted, QKV, after, QKV_COUNT));
  CHECK(memcmp(before, after, sizeof before) == 0);
  float b[B_COUNT], a[A_COUNT], copy[B_COUNT];
  OK(mxt_model_tensor_read(adapted, A, a, A_COUNT));
  OK(mxt_model_tensor_read(adapted, B, b, B_COUNT));
  CHECK(b[0] != 0.0f);

  const char *adapter = in_folder(folder, "adapter");
  OK(mxt_model_save_lora(adapted, adapter));
  OK(mxt_model_load_lora(base, adapter, &again));
  OK(mxt_model_tensor_read(again, B, copy, B_COUNT));
  CHECK(memcmp(b, copy, sizeof b) == 0);

  /* And in memory, with the folder's bytes. */
  mxt_files *memory = NULL;
  mxt_model *third = NULL;
  OK(mxt_files_in_memory(&memory));
  OK(mxt_model_save_lora_to(adapted, memory));
  OK(mxt_model_load_lora_from(base, memory, &third));
  OK(mxt_model_tensor_read(third, B, copy, B_COUNT));
  CHECK(memcmp(b, copy, sizeof b) == 0);
  FAILS(MXT_ERROR_INVALID_ARGUMENT, "adapters", mxt_model_save_lora_to(base, memory));
  FAILS(MXT_ERROR_FORMAT, "config.json", mxt_model_load_from(engine, memory, &merged));
  mxt_model_free(third);
  mxt_files_free(memory);

  OK(mxt_model_merge_lora(adapted, &merged));
  OK(mxt_model_tensor_read(merged, QKV, after, QKV_COUNT));
  for (int in = 0; in < 16; in++)
    for (int out = 0; out < 48; out++) {
      double sum = 0.0;
      for (int r = 0; r < RANK; r++) sum += (double)b[out * RANK + r] * a[r * 16 + in];
      const double expected = before[in * 48 + out] + 2.0 * sum;
      CHECK(fabs(after[in * 48 + out] - expected) < 1e-6);
    }

  mxt_model *none = NULL;
  FAILS(MXT_ERROR_INVALID_ARGUMENT, "rank", mxt_model_with_lora(base, 0, 0.0f, 0, &none));
  FAILS(MXT_ERROR_INVALID_ARGUMENT, "rank", mxt_model_with_lora(base, SIZE_MAX, 0.0f, 0, &none));
  FAILS(MXT_ERROR_INVALID_ARGUMENT, "alpha", mxt_model_with_lora(base, 1, NAN, 0, &none));
  FAILS(MXT_ERROR_INVALID_ARGUMENT, "layers", mxt_model_with_lora(base, 1, 0.0f, 16, &none));
  FAILS(MXT_ERROR_INVALID_ARGUMENT, "adapters", mxt_model_with_lora(adapted, 1, 0.0f, 0, &none));
  FAILS(MXT_ERROR_INVALID_ARGUMENT, "adapters", mxt_model_load_lora(adapted, adapter, &none));
  FAILS(MXT_ERROR_INVALID_ARGUMENT, "adapters", mxt_model_merge_lora(base, &none));
  FAILS(MXT_ERROR_INVALID_ARGUMENT, "adapters", mxt_model_save_lora(base, adapter));
  FAILS(MXT_ERROR_IO, "nowhere", mxt_model_load_lora(base, in_folder(folder, "nowhere"), &none));
  CHECK(none == NULL);
  config = small_config();
  config.lora_layers = 1;
  OK(mxt_model_new(engine, &config, &none)); /* A rank of 0 is none. */
  mxt_model_free(none);
  none = NULL;
  config.lora_rank = 2;
  config.lora_layers = 99;
  FAILS(MXT_ERROR_INVALID_ARGUMENT, "lora layers", mxt_model_new(engine, &config, &none));

  /* The base may go first. */
  mxt_model_free(base);
  step(trainer, dataset);
  mxt_trainer_free(trainer);
  mxt_model_free(merged);
  mxt_model_free(again);
  mxt_model_free(adapted);
}

static void frozen(const mxt_engine *engine, const mxt_dataset *dataset) {
  mxt_model *model = new_model(engine);
  mxt_trainer_options options = small_options();
  mxt_trainer *trainer = NULL;
  options.frozen = "*.c_attn.*,transformer.wpe.weight";
  OK(mxt_trainer_new(model, &options, &trainer));
  mxt_trainer_options seen;
  seen.struct_size = sizeof seen;
  OK(mxt_trainer_get_options(trainer, &seen));
  CHECK(strcmp(seen.frozen, options.frozen) == 0);
  OK(mxt_model_tensor_read(model, QKV, before, QKV_COUNT));
  for (int i = 0; i < 3; i++) step(trainer, dataset);
  OK(mxt_model_tensor_read(model, QKV, after, QKV_COUNT));
  CHECK(memcmp(before, after, sizeof before) == 0);
  FAILS(MXT_ERROR_INVALID_ARGUMENT, "frozen",
        mxt_trainer_write_gradient(trainer, QKV, before, QKV_COUNT));
  mxt_trainer_free(trainer);
  trainer = NULL;
  options.frozen = "no.such.*";
  FAILS(MXT_ERROR_INVALID_ARGUMENT, "no.such", mxt_trainer_new(model, &options, &trainer));
  options.frozen = "*";
  FAILS(MXT_ERROR_INVALID_ARGUMENT, "frozen", mxt_trainer_new(model, &options, &trainer));
  options.frozen = "[";
  FAILS(MXT_ERROR_INVALID_ARGUMENT, "frozen", mxt_trainer_new(model, &options, &trainer));
  options.frozen = "\xff";
  FAILS(MXT_ERROR_UTF8, "frozen", mxt_trainer_new(model, &options, &trainer));
  CHECK(trainer == NULL);
  mxt_model_free(model);
}

int main(int argc, char **argv) {
  CHECK(argc == 2);
  mxt_engine *engine = new_engine();
  mxt_dataset *dataset = new_dataset();
  adapters(engine, dataset, argv[1]);
  frozen(engine, dataset);
  mxt_dataset_free(dataset);
  mxt_engine_free(engine);
  return 0;
}
