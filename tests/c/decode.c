/* Decoders: their logits are the model's, texts beside each other, forks, errors that change
   nothing, a model that is trained, and several decoders at once. */
#include "check.h"

#include <pthread.h>

enum { VOCAB = 32 };

static void same(mxt_decoder *decoder, size_t sequence, mxt_model *model, const uint32_t *tokens,
                 size_t count) {
  float logits[VOCAB], whole[VOCAB];
  OK(mxt_decoder_logits(decoder, sequence, logits, VOCAB));
  OK(mxt_model_next_logits(model, tokens, count, whole, VOCAB));
  CHECK(memcmp(logits, whole, sizeof logits) == 0);
  uint32_t text[16];
  size_t written = 0;
  OK(mxt_decoder_tokens(decoder, sequence, text, 16, &written));
  CHECK(written == count && memcmp(text, tokens, 4 * count) == 0);
}

static void *decode(void *model) {
  mxt_decoder *decoder = NULL;
  OK(mxt_decoder_new(model, NULL, &decoder));
  const uint32_t text[] = {1, 2, 3, 4, 5, 6, 7, 8};
  for (size_t i = 0; i < 8; i++) {
    OK(mxt_decoder_push(decoder, 0, text + i, 1));
    same(decoder, 0, model, text, i + 1);
  }
  mxt_decoder_free(decoder);
  return NULL;
}

int main(void) {
  mxt_engine *engine = new_engine();
  mxt_model *model = new_model(engine);
  mxt_decoder_options options;
  OK(mxt_decoder_options_init(&options, sizeof options));
  CHECK(options.sequences == 1 && options.room == 0 && options.reserved == 0);
  CHECK(options.weights == MXT_DECODER_WEIGHTS_F32);
  options.sequences = 2;
  options.room = 8;
  mxt_decoder *decoder = NULL, *none = NULL;
  OK(mxt_decoder_new(model, &options, &decoder));

  const uint32_t text[] = {1, 2, 3, 4, 5, 6, 7, 8, 9};
  float logits[VOCAB];
  FAILS(MXT_ERROR_INVALID_ARGUMENT, "at least one", mxt_decoder_logits(decoder, 0, logits, VOCAB));
  OK(mxt_decoder_push(decoder, 0, text, 3));
  same(decoder, 0, model, text, 3);
  OK(mxt_decoder_push(decoder, 1, text + 5, 2));
  same(decoder, 1, model, text + 5, 2);
  OK(mxt_decoder_push(decoder, 0, text + 3, 2));
  OK(mxt_decoder_fork(decoder, 0, 1));
  OK(mxt_decoder_rewind(decoder, 0, 1));
  same(decoder, 1, model, text, 5);
  same(decoder, 0, model, text, 1);

  FAILS(MXT_ERROR_INVALID_ARGUMENT, "sequence", mxt_decoder_push(decoder, 2, text, 1));
  FAILS(MXT_ERROR_INVALID_ARGUMENT, "sequence", mxt_decoder_logits(decoder, 2, logits, VOCAB));
  FAILS(MXT_ERROR_INVALID_ARGUMENT, "sequence", mxt_decoder_rewind(decoder, 2, 0));
  FAILS(MXT_ERROR_INVALID_ARGUMENT, "sequence", mxt_decoder_fork(decoder, 0, SIZE_MAX));
  uint32_t tokens[8];
  size_t written = 77;
  FAILS(MXT_ERROR_INVALID_ARGUMENT, "sequence",
        mxt_decoder_tokens(decoder, 2, tokens, 8, &written));
  FAILS(MXT_ERROR_BUFFER_TOO_SMALL, "5", mxt_decoder_tokens(decoder, 1, tokens, 4, &written));
  CHECK(written == 77);
  OK(mxt_decoder_tokens(decoder, 1, NULL, 0, &written));
  CHECK(written == 5);
  FAILS(MXT_ERROR_INVALID_ARGUMENT, "at most 3", mxt_decoder_push(decoder, 1, text, 4));
  CHECK(strstr(mxt_decoder_last_error(decoder), "at most 3") != NULL);
  const uint32_t wrong[] = {1, VOCAB};
  FAILS(MXT_ERROR_TOKEN_RANGE, "32", mxt_decoder_push(decoder, 1, wrong, 2));
  FAILS(MXT_ERROR_INVALID_ARGUMENT, "logits", mxt_decoder_logits(decoder, 1, logits, VOCAB - 1));
  FAILS(MXT_ERROR_INVALID_ARGUMENT, "at most 5", mxt_decoder_rewind(decoder, 1, 6));
  OK(mxt_decoder_push(decoder, 1, NULL, 0));
  same(decoder, 1, model, text, 5);

  options.room = 1000000;
  FAILS(MXT_ERROR_INVALID_ARGUMENT, "room", mxt_decoder_new(model, &options, &none));
  options.room = 4;
  options.sequences = 0;
  FAILS(MXT_ERROR_INVALID_ARGUMENT, "sequences", mxt_decoder_new(model, &options, &none));
  options.sequences = SIZE_MAX;
  FAILS(MXT_ERROR_INVALID_ARGUMENT, "65536", mxt_decoder_new(model, &options, &none));
  options.sequences = 1;
  options.weights = 3;
  FAILS(MXT_ERROR_INVALID_ARGUMENT, "weights", mxt_decoder_new(model, &options, &none));
  options.weights = MXT_DECODER_WEIGHTS_BF16;
  options.reserved = 1;
  FAILS(MXT_ERROR_INVALID_ARGUMENT, "reserved", mxt_decoder_new(model, &options, &none));
  CHECK(none == NULL);
  for (int32_t weights = MXT_DECODER_WEIGHTS_BF16; weights <= MXT_DECODER_WEIGHTS_MXFP4;
       weights++) {
    options.reserved = 0;
    options.weights = weights;
    OK(mxt_decoder_new(model, &options, &none));
    OK(mxt_decoder_push(none, 0, text, 3));
    OK(mxt_decoder_logits(none, 0, logits, VOCAB));
    mxt_decoder_free(none);
  }

  /* It follows its model, also behind the model's handle. */
  mxt_trainer *trainer = new_trainer(model);
  mxt_dataset *dataset = new_dataset();
  OK(mxt_decoder_logits(decoder, 1, logits, VOCAB));
  OK(mxt_trainer_step(trainer, dataset, NULL));
  float after[VOCAB];
  OK(mxt_decoder_logits(decoder, 1, after, VOCAB));
  CHECK(memcmp(logits, after, sizeof logits) != 0);
  same(decoder, 1, model, text, 5);

  pthread_t threads[4];
  for (int i = 0; i < 4; i++) CHECK(pthread_create(&threads[i], NULL, decode, model) == 0);
  for (int i = 0; i < 4; i++) CHECK(pthread_join(threads[i], NULL) == 0);

  mxt_trainer_free(trainer), mxt_dataset_free(dataset), mxt_model_free(model);
  mxt_engine_free(engine);
  OK(mxt_decoder_logits(decoder, 0, logits, VOCAB));
  mxt_decoder_free(decoder);
  return 0;
}
