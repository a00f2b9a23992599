/* Decoders: their logits are the model's, texts beside each other, forks, errors that change
   nothing, a model that is trained, and several decoders at once. */
#include "check.h"

#include <math.h>
#include <pthread.h>

enum { VOCAB = 32, CHANNELS = 16 };

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

typedef struct {
  mxt_decoder *decoder;
  mxt_model *model;
  uint32_t seen[16];
  size_t count, most;
} Watch;

static int32_t on_token(void *user_data, uint32_t token) {
  Watch *watch = user_data;
  float logits[VOCAB];
  size_t written;
  RETURNS(MXT_ERROR_BUSY, mxt_decoder_logits(watch->decoder, 0, logits, VOCAB));
  RETURNS(MXT_ERROR_BUSY, mxt_decoder_generate(watch->decoder, 0, NULL, NULL, 0, &written));
  watch->seen[watch->count++] = token;
  return watch->count == watch->most;
}

/* Logits of all tokens are those after each; a continuation is that of the model and is appended,
   whoever drafts, and a text goes on behind its room. */
static void continuations(mxt_model *model) {
  const uint32_t text[] = {1, 2, 3, 4, 5};
  mxt_decoder_options options;
  OK(mxt_decoder_options_init(&options, sizeof options));
  options.room = 8;
  options.drafts = 1;
  mxt_decoder *decoder = NULL;
  OK(mxt_decoder_new(model, &options, &decoder));
  size_t written = 77;
  FAILS(MXT_ERROR_INVALID_ARGUMENT, "at least one",
        mxt_decoder_generate(decoder, 0, NULL, NULL, 0, &written));
  OK(mxt_decoder_push(decoder, 0, text, 5));
  float logits[4][VOCAB], whole[VOCAB];
  OK(mxt_decoder_logits_from(decoder, 0, 1, logits[0], 4 * VOCAB));
  for (size_t i = 0; i < 4; i++) {
    OK(mxt_model_next_logits(model, text, i + 2, whole, VOCAB));
    CHECK(memcmp(logits[i], whole, sizeof whole) == 0);
  }
  FAILS(MXT_ERROR_INVALID_ARGUMENT, "got 5",
        mxt_decoder_logits_from(decoder, 0, 5, logits[0], VOCAB));
  FAILS(MXT_ERROR_INVALID_ARGUMENT, "4 times 32 numbers, got 32",
        mxt_decoder_logits_from(decoder, 0, 1, logits[0], VOCAB));

  /* What a text's own logits say of its next tokens, whatever texts lie beside it. */
  const size_t lengths[3] = {5, 0, 2};
  const uint32_t texts[7] = {text[0], text[1], text[2], text[3], text[4], text[0], text[1]};
  float scores[7], hidden[7 * CHANNELS];
  OK(mxt_model_score(model, MXT_DECODER_WEIGHTS_F32, texts, 7, lengths, 3, scores, hidden));
  CHECK(scores[0] == 0.0f && scores[5] == 0.0f && scores[6] == scores[1]);
  CHECK(memcmp(hidden, hidden + 5 * CHANNELS, 2 * CHANNELS * sizeof(float)) == 0);
  for (size_t i = 0; i < 3; i++) {
    double sum = 0;
    for (size_t k = 0; k < VOCAB; k++) sum += exp(logits[i][k]);
    double off = scores[i + 2] - (logits[i][text[i + 2]] - log(sum));
    CHECK(off < 1e-5 && off > -1e-5);
  }
  FAILS(MXT_ERROR_INVALID_ARGUMENT, "add up to the 6 tokens, got 7",
        mxt_model_score(model, MXT_DECODER_WEIGHTS_F32, texts, 6, lengths, 3, scores, NULL));
  FAILS(MXT_ERROR_INVALID_ARGUMENT, "or MXT_DECODER_WEIGHTS_BF16 (1), got 2",
        mxt_model_score(model, MXT_DECODER_WEIGHTS_MXFP4, texts, 7, lengths, 3, scores, NULL));
  FAILS(MXT_ERROR_TOKEN_RANGE, "99",
        mxt_model_score(model, MXT_DECODER_WEIGHTS_BF16, (const uint32_t[]){1, 99}, 2,
                        (const size_t[]){2}, 1, scores, NULL));

  mxt_generate_options how;
  OK(mxt_generate_options_init(&how, sizeof how));
  CHECK(how.draft == MXT_DRAFT_NONE && how.draft_tokens == 0 && how.drafted == NULL);
  how.max_tokens = 3;
  uint32_t plain[12], tokens[12];
  OK(mxt_model_generate(model, &how, text, 5, plain, 3, &written));
  for (int32_t draft = MXT_DRAFT_NONE; draft <= MXT_DRAFT_MXFP4_NGRAM; draft++) {
    uint64_t drafted = 77, accepted = 77;
    how.draft = draft;
    how.draft_tokens = 2;
    how.drafted = &drafted;
    how.accepted = &accepted;
    OK(mxt_decoder_rewind(decoder, 0, 5));
    OK(mxt_decoder_generate(decoder, 0, &how, tokens, 3, &written));
    CHECK(written == 3 && memcmp(tokens, plain, sizeof plain[0] * 3) == 0);
    CHECK(accepted <= drafted && (draft == MXT_DRAFT_NONE) <= (drafted == 0));
    CHECK((draft < MXT_DRAFT_MXFP4) || drafted > 0);
    OK(mxt_decoder_tokens(decoder, 0, tokens, 12, &written));
    CHECK(written == 8 && memcmp(tokens, text, sizeof text) == 0);
    CHECK(memcmp(tokens + 5, plain, sizeof plain[0] * 3) == 0);
    /* The same of the model itself. */
    OK(mxt_model_generate(model, &how, text, 5, tokens, 3, &written));
    CHECK(memcmp(tokens, plain, sizeof plain[0] * 3) == 0);
  }
  /* Behind its room the oldest fall out. */
  OK(mxt_decoder_generate(decoder, 0, &how, tokens, 3, &written));
  OK(mxt_decoder_tokens(decoder, 0, tokens, 12, &written));
  CHECK(written == 8 && tokens[0] == text[3]);

  /* Several at once are those of each. */
  mxt_decoder *together = NULL;
  OK(mxt_decoder_options_init(&options, sizeof options));
  options.sequences = 3;
  OK(mxt_decoder_new(model, &options, &together));
  OK(mxt_decoder_push(together, 2, text, 5));
  OK(mxt_decoder_push(together, 0, text, 3));
  const size_t both[] = {0, 2}, twice[] = {2, 2}, empty[] = {1}, outside[] = {3};
  OK(mxt_decoder_logits_of(together, both, 2, logits[0], 2 * VOCAB));
  for (size_t i = 0; i < 2; i++) {
    OK(mxt_model_next_logits(model, text, i == 0 ? 3 : 5, whole, VOCAB));
    CHECK(memcmp(logits[i], whole, sizeof whole) == 0);
  }
  FAILS(MXT_ERROR_INVALID_ARGUMENT, "2 twice",
        mxt_decoder_logits_of(together, twice, 2, logits[0], 2 * VOCAB));
  FAILS(MXT_ERROR_INVALID_ARGUMENT, "none in 1",
        mxt_decoder_logits_of(together, empty, 1, logits[0], VOCAB));
  FAILS(MXT_ERROR_INVALID_ARGUMENT, "from 0 to 2, got 3",
        mxt_decoder_logits_of(together, outside, 1, logits[0], VOCAB));
  OK(mxt_decoder_logits_of(together, NULL, 0, NULL, 0));
  size_t of_each[2] = {77, 77};
  how.draft = MXT_DRAFT_NONE;
  how.seed -= 1;
  OK(mxt_decoder_generate_each(together, both, 2, &how, tokens, 4, of_each));
  CHECK(of_each[0] == 3 && of_each[1] == 3 && memcmp(tokens + 4, plain, 12) == 0);
  FAILS(MXT_ERROR_BUFFER_TOO_SMALL, "3 tokens of each",
        mxt_decoder_generate_each(together, both, 2, &how, tokens, 2, of_each));
  how.on_token = on_token;
  FAILS(MXT_ERROR_INVALID_ARGUMENT, "on_token",
        mxt_decoder_generate_each(together, both, 2, &how, tokens, 4, of_each));
  how.on_token = NULL;
  how.draft = MXT_DRAFT_NGRAM;
  FAILS(MXT_ERROR_INVALID_ARGUMENT, "draft",
        mxt_decoder_generate_each(together, both, 2, &how, tokens, 4, of_each));
  how.draft = MXT_DRAFT_NONE;
  OK(mxt_decoder_generate_each(together, NULL, 0, NULL, NULL, 0, NULL));
  uint64_t drafted = 77, accepted = 77;
  how.max_tokens = 0;
  how.drafted = &drafted;
  how.accepted = &accepted;
  OK(mxt_decoder_generate_each(together, both, 2, &how, NULL, 0, of_each));
  CHECK(of_each[0] == 0 && of_each[1] == 0 && drafted == 0 && accepted == 0);
  FAILS(MXT_ERROR_INVALID_ARGUMENT, "2 twice",
        mxt_decoder_generate_each(together, twice, 2, &how, NULL, 0, of_each));
  how.max_tokens = 3;
  how.drafted = how.accepted = NULL;
  how.seed += 1;
  mxt_decoder_free(together);

  Watch watch = {decoder, model, {0}, 0, 2};
  how.on_token = on_token;
  how.user_data = &watch;
  OK(mxt_decoder_rewind(decoder, 0, 0));
  OK(mxt_decoder_push(decoder, 0, text, 5));
  OK(mxt_decoder_generate(decoder, 0, &how, NULL, 0, &written));
  CHECK(written == 2 && watch.count == 2 && memcmp(watch.seen, plain, 8) == 0);
  OK(mxt_decoder_tokens(decoder, 0, tokens, 12, &written));
  CHECK(written == 7);

  how.draft = 4;
  FAILS(MXT_ERROR_INVALID_ARGUMENT, "MXT_DRAFT_MXFP4 (2) or MXT_DRAFT_MXFP4_NGRAM (3), got 4",
        mxt_decoder_generate(decoder, 0, &how, NULL, 0, &written));
  how.draft = MXT_DRAFT_NGRAM;
  how.draft_tokens = 16;
  FAILS(MXT_ERROR_INVALID_ARGUMENT, "draft_tokens",
        mxt_decoder_generate(decoder, 0, &how, NULL, 0, &written));
  how.draft_tokens = 15;
  FAILS(MXT_ERROR_BUFFER_TOO_SMALL, "3 tokens",
        mxt_decoder_generate(decoder, 0, &how, tokens, 2, &written));
  FAILS(MXT_ERROR_INVALID_ARGUMENT, "sequence",
        mxt_decoder_generate(decoder, 1, &how, NULL, 0, &written));
  how.drafted = (uint64_t *)((char *)plain + 1);
  FAILS(MXT_ERROR_INVALID_ARGUMENT, "drafted",
        mxt_decoder_generate(decoder, 0, &how, NULL, 0, &written));
  how.drafted = NULL;
  how.draft = MXT_DRAFT_MXFP4;
  mxt_decoder_free(decoder);
  OK(mxt_decoder_new(model, NULL, &decoder));
  OK(mxt_decoder_push(decoder, 0, text, 5));
  FAILS(MXT_ERROR_INVALID_ARGUMENT, "make it with drafts",
        mxt_decoder_generate(decoder, 0, &how, NULL, 0, &written));
  how.weights = MXT_DECODER_WEIGHTS_MXFP4;
  FAILS(MXT_ERROR_INVALID_ARGUMENT, "the model itself has here",
        mxt_model_generate(model, &how, text, 5, NULL, 0, &written));
  mxt_decoder_free(decoder);
}

int main(void) {
  mxt_engine *engine = new_engine();
  mxt_model *model = new_model(engine);
  mxt_decoder_options options;
  OK(mxt_decoder_options_init(&options, sizeof options));
  CHECK(options.sequences == 1 && options.room == 0 && options.drafts == 0);
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
  options.drafts = 2;
  FAILS(MXT_ERROR_INVALID_ARGUMENT, "drafts", mxt_decoder_new(model, &options, &none));
  options.drafts = 1;
  options.weights = MXT_DECODER_WEIGHTS_MXFP4;
  FAILS(MXT_ERROR_INVALID_ARGUMENT, "drafts", mxt_decoder_new(model, &options, &none));
  CHECK(none == NULL);
  for (int32_t weights = MXT_DECODER_WEIGHTS_BF16; weights <= MXT_DECODER_WEIGHTS_MXFP4;
       weights++) {
    options.drafts = weights == MXT_DECODER_WEIGHTS_BF16;
    options.weights = weights;
    OK(mxt_decoder_new(model, &options, &none));
    OK(mxt_decoder_push(none, 0, text, 3));
    OK(mxt_decoder_logits(none, 0, logits, VOCAB));
    mxt_decoder_free(none);
  }

  continuations(model);

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
