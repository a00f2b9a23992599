/* Arrays and strings that another thread changes during a call: an error or a result, no panic. */
#define _POSIX_C_SOURCE 200809L
#include "check.h"

#include <pthread.h>

enum { ACCUMULATION = 8, TOKENS = ACCUMULATION * BATCH * (CONTEXT + 1) };

static uint32_t tokens[TOKENS];
static char name[] = "transformer.wte.weight";
static int done;

/* Makes tokens and letters bad and good again. */
static void *change(void *unused) {
  while (!__atomic_load_n(&done, __ATOMIC_ACQUIRE)) {
    for (int bad = 1; bad >= 0; bad--) {
      for (int i = 0; i < TOKENS; i += 5)
        __atomic_store_n(&tokens[i], bad ? 0xfffffff0u : 3u, __ATOMIC_RELAXED);
      __atomic_store_n(&name[5], bad ? (char)0xf0 : 'f', __ATOMIC_RELAXED);
    }
  }
  return unused;
}

/* Counts calls that are done and those that are refused for a token out of range. */
static int calls[2];

static void count(mxt_status status) {
  if (status != MXT_OK) RETURNS(MXT_ERROR_TOKEN_RANGE, status);
  calls[status != MXT_OK]++;
}

int main(void) {
  mxt_engine *engine = new_engine();
  mxt_model *model = new_model(engine);
  mxt_trainer_options options = small_options();
  mxt_trainer *trainer = NULL;
  mxt_generate_options generate;
  mxt_dataset *dataset = NULL;
  static float weights[VOCABULARY * 16], logits[VOCABULARY];
  uint32_t out[2];
  size_t written = 0;
  pthread_t changer;
  options.accumulation = ACCUMULATION;
  OK(mxt_trainer_new(model, &options, &trainer));
  OK(mxt_generate_options_init(&generate, sizeof generate));
  generate.max_tokens = 2;
  CHECK(pthread_create(&changer, NULL, change, NULL) == 0);
  for (int i = 0; i < 300; i++) {
    const uint64_t steps = mxt_trainer_steps_done(trainer);
    const int stepped = calls[0];
    count(mxt_trainer_step_tokens(trainer, tokens, TOKENS, NULL));
    CHECK(mxt_trainer_steps_done(trainer) == steps + (uint64_t)(calls[0] - stepped));
    count(mxt_model_generate(model, &generate, tokens, CONTEXT, out, 2, &written));
    count(mxt_model_next_logits(model, tokens, CONTEXT, logits, VOCABULARY));
    OK(mxt_dataset_from_tokens(tokens, TOKENS, &dataset));
    mxt_dataset_free(dataset);
    const mxt_status status =
        mxt_model_tensor_read(model, name, weights, sizeof weights / sizeof *weights);
    CHECK(status == MXT_OK || status == MXT_ERROR_UTF8 || status == MXT_ERROR_NO_SUCH_TENSOR);
  }
  __atomic_store_n(&done, 1, __ATOMIC_RELEASE);
  CHECK(pthread_join(changer, NULL) == 0);
  OK(mxt_trainer_step_tokens(trainer, tokens, TOKENS, NULL));
  mxt_trainer_free(trainer);
  mxt_model_free(model);
  mxt_engine_free(engine);
  return 0;
}
