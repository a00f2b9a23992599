/* Ranks of a group as processes of a C host: the same bits as one that trains alone, one error on
 * all, and an end when one of them is killed. */
#define _GNU_SOURCE
#include "ranks.h"

/* How many are killed, and of these how many are missed by a deadline, as where nothing breaks. */
#ifndef KILLS
#define KILLS 24
#endif
enum { STEPS = 6, MISSED_LATE = 3 };

static const char *folder;
/* What ranks find, for the process that started them. */
static struct shared {
  float losses[MOST_RANKS][STEPS + 1];
  volatile int phase; /* 1 when ranks train, 2 when they have saved */
} *shared;

static mxt_trainer *trainer_of(mxt_model *model) {
  mxt_trainer_options options = small_options();
  mxt_trainer *trainer = NULL;
  options.lanes = 4;
  OK(mxt_trainer_new(model, &options, &trainer));
  OK(mxt_trainer_get_options(trainer, &options));
  CHECK(options.lanes == 4 && options.accumulation == 4);
  return trainer;
}

/* Steps, an evaluation and a checkpoint. */
static void work(mxt_trainer *trainer, const mxt_dataset *dataset, const char *name,
                 float *losses) {
  for (int i = 0; i < STEPS; i++) {
    const mxt_step_stats stats = step(trainer, dataset);
    CHECK(stats.tokens == 4 * BATCH * CONTEXT);
    losses[i] = stats.loss;
  }
  mxt_eval_stats eval;
  eval.struct_size = sizeof eval;
  OK(mxt_trainer_eval(trainer, dataset, 5, &eval));
  losses[STEPS] = eval.loss;
  OK(mxt_trainer_save(trainer, in_folder(folder, name)));
}

/* Ends after step 3 by rank 1's answer. */
static int32_t on_step(void *user_data, const mxt_step_stats *stats, const mxt_eval_stats *eval) {
  (void)eval;
  return *(const uint32_t *)user_data == 1 && stats->step == 3;
}

static int trains(struct place *place) {
  mxt_engine *engine = engine_of(place);
  CHECK(mxt_engine_rank(engine) == place->rank);
  CHECK(mxt_engine_ranks(engine) == place->meeting->size);
  mxt_model *model = new_model(engine);
  mxt_dataset *dataset = new_dataset();
  mxt_trainer *trainer = trainer_of(model);
  work(trainer, dataset, "ranks", shared->losses[place->rank]);
  mxt_memory_plan plan;
  plan.struct_size = sizeof plan;
  const mxt_model_config config = small_config();
  mxt_trainer_options options = small_options();
  options.lanes = 4;
  OK(mxt_plan(engine, &config, &options, &plan));
  CHECK((plan.exchange > 0) == (place->meeting->size < 4));

  /* A run that a callback of one rank ends, for all of them, before the step after. */
  mxt_trainer *other = trainer_of(model);
  mxt_run_options run;
  mxt_run_result result;
  result.struct_size = sizeof result;
  OK(mxt_run_options_init(&run, sizeof run));
  run.steps = 10;
  run.on_step = on_step;
  run.user_data = &place->rank;
  run.save_dir = in_folder(folder, "run");
  OK(mxt_trainer_run(other, dataset, &run, &result));
  CHECK(result.steps == 3 && result.saved == 1);
  CHECK(result.end == (place->rank == 1 ? MXT_RUN_END_CALLBACK : MXT_RUN_END_REQUEST));
  /* A stop that rank 0 asks for. */
  if (place->rank == 0) mxt_trainer_request_stop(other);
  run.on_step = NULL;
  OK(mxt_trainer_run(other, dataset, &run, &result));
  CHECK(result.steps == 0 && result.end == MXT_RUN_END_REQUEST);

  /* A run of another length on one; and a folder that only rank 0 needs. */
  run.steps = 2 + (place->rank == 1);
  run.save_dir = NULL;
  FAILS(MXT_ERROR_MISMATCH, "steps of the run", mxt_trainer_run(other, dataset, &run, &result));
  OK(mxt_trainer_save(other, place->rank == 0 ? in_folder(folder, "first") : ""));

  /* A token that only one has; all go on. */
  uint32_t tokens[4 * BATCH * (CONTEXT + 1)] = {1, 2, 3};
  const size_t count = sizeof tokens / sizeof tokens[0] / place->meeting->size;
  const uint32_t last = place->meeting->size - 1;
  if (place->rank == last) tokens[5] = VOCABULARY;
  if (place->rank == last)
    FAILS(MXT_ERROR_TOKEN_RANGE, "token 32", mxt_trainer_step_tokens(other, tokens, count, NULL));
  else FAILS(MXT_ERROR_PEER, "token 32", mxt_trainer_step_tokens(other, tokens, count, NULL));
  tokens[5] = 0;
  OK(mxt_trainer_step_tokens(other, tokens, count, NULL));
  CHECK(mxt_trainer_steps_done(other) == 4);

  mxt_engine_free(engine);
  mxt_model_free(model);
  mxt_dataset_free(dataset);
  mxt_trainer_free(other);
  CHECK(place->frees == 0);
  mxt_trainer_free(trainer);
  CHECK(place->frees == 1 && place->aborts == 0);
  return 0;
}

static void check_same_file(const char *a, const char *b, const char *file) {
  char path[8192];
  long sizes[2];
  char *bytes[2];
  const char *folders[2] = {a, b};
  for (int i = 0; i < 2; i++) {
    snprintf(path, sizeof path, "%s/%s", folders[i], file);
    FILE *stream = fopen(path, "rb");
    CHECK(stream != NULL && fseek(stream, 0, SEEK_END) == 0);
    sizes[i] = ftell(stream);
    rewind(stream);
    bytes[i] = malloc((size_t)sizes[i]);
    CHECK(bytes[i] != NULL && fread(bytes[i], 1, (size_t)sizes[i], stream) == (size_t)sizes[i]);
    fclose(stream);
  }
  CHECK(sizes[0] == sizes[1] && memcmp(bytes[0], bytes[1], (size_t)sizes[0]) == 0);
  free(bytes[0]);
  free(bytes[1]);
}

static int alone(struct place *place) {
  mxt_engine *engine = new_engine();
  CHECK(mxt_engine_rank(engine) == 0 && mxt_engine_ranks(engine) == 1);
  mxt_model *model = new_model(engine);
  mxt_dataset *dataset = new_dataset();
  mxt_trainer *trainer = trainer_of(model);
  work(trainer, dataset, "alone", shared->losses[place->rank]);
  mxt_trainer_free(trainer);
  mxt_dataset_free(dataset);
  mxt_model_free(model);
  mxt_engine_free(engine);
  return 0;
}

/* States that are kept by one rank each: the same files, and snapshots that all make. */
static int shards(struct place *place) {
  mxt_group group = group_of(place);
  mxt_engine_options options;
  mxt_engine *engine = NULL;
  OK(mxt_engine_options_init(&options, sizeof options));
  options.threads = 1;
  options.group = &group;
  group.shard_states = 1;
  OK(mxt_engine_new(&options, &engine));
  mxt_model *model = new_model(engine);
  mxt_dataset *dataset = new_dataset();
  mxt_trainer *trainer = trainer_of(model);
  work(trainer, dataset, "sharded", shared->losses[place->rank]);
  FAILS(MXT_ERROR_INVALID_ARGUMENT, "shard_states", mxt_trainer_watch_updates(trainer, 1));
  mxt_snapshot *snapshot = NULL;
  OK(mxt_trainer_snapshot(trainer, &snapshot));
  if (place->rank == 0) OK(mxt_snapshot_save(snapshot, in_folder(folder, "copied")));
  else FAILS(MXT_ERROR_INVALID_ARGUMENT, "rank 0", mxt_snapshot_save(snapshot, folder));
  step(trainer, dataset);
  /* One that calls something else: nothing is lost, neither the snapshot nor the group. */
  if (place->rank == 0)
    FAILS(MXT_ERROR_MISMATCH, "copies step", mxt_snapshot_renew(snapshot, trainer));
  else FAILS(MXT_ERROR_MISMATCH, "copies step", mxt_trainer_step(trainer, dataset, NULL));
  if (place->rank == 0) OK(mxt_snapshot_save(snapshot, in_folder(folder, "copied")));
  OK(mxt_snapshot_renew(snapshot, trainer));
  mxt_trainer_options how = small_options();
  how.optimizer = "stable-adamw";
  mxt_trainer *other = NULL;
  FAILS(MXT_ERROR_INVALID_ARGUMENT, "got stable-adamw", mxt_trainer_new(model, &how, &other));
  mxt_snapshot_free(snapshot);
  mxt_trainer_free(trainer);
  mxt_dataset_free(dataset);
  mxt_model_free(model);
  mxt_engine_free(engine);
  return 0;
}

/* What is wrong with a group, before and while ranks meet. */
static int is_refused(struct place *place) {
  mxt_engine_options options;
  mxt_engine *engine = NULL;
  mxt_group group = group_of(place);
  OK(mxt_engine_options_init(&options, sizeof options));
  options.threads = 1;
  options.group = &group;
  group.all_gather = NULL;
  FAILS(MXT_ERROR_NULL, "all_to_all or all_gather", mxt_engine_new(&options, &engine));
  group = group_of(place);
  group.rank = group.size;
  FAILS(MXT_ERROR_INVALID_ARGUMENT, "group: expected a rank below",
        mxt_engine_new(&options, &engine));
  group = group_of(place);
  group.transport = 4;
  FAILS(MXT_ERROR_INVALID_ARGUMENT, "MXT_TRANSPORT_PEER (3), got 4",
        mxt_engine_new(&options, &engine));
  group.transport = MXT_TRANSPORT_AUTO;
  group.timeout_seconds = 0;
  FAILS(MXT_ERROR_INVALID_ARGUMENT, "timeout_seconds", mxt_engine_new(&options, &engine));
  group.timeout_seconds = UINT64_MAX;
  group.shard_states = 2;
  FAILS(MXT_ERROR_INVALID_ARGUMENT, "shard_states", mxt_engine_new(&options, &engine));
  group.shard_states = 0;
  group.gradient_wire = 4;
  FAILS(MXT_ERROR_INVALID_ARGUMENT, "MXT_WIRE_MXFP4 (3), got 4", mxt_engine_new(&options, &engine));
  group.gradient_wire = MXT_WIRE_MXFP4;
  group.reserved = 1;
  FAILS(MXT_ERROR_INVALID_ARGUMENT, "reserved: expected 0", mxt_engine_new(&options, &engine));
  group.struct_size = 12;
  FAILS(MXT_ERROR_STRUCT_SIZE, "group", mxt_engine_new(&options, &engine));
  CHECK(place->calls == 0);
  group = group_of(place);
  options.seed += place->rank;
  FAILS(MXT_ERROR_MISMATCH, "seed must be the same on all ranks",
        mxt_engine_new(&options, &engine));
  /* On one the device is none. */
  options.seed = 7;
  options.device = place->rank == 0 ? "tpu" : NULL;
  if (place->rank == 0) FAILS(MXT_ERROR_INVALID_ARGUMENT, "tpu", mxt_engine_new(&options, &engine));
  else FAILS(MXT_ERROR_PEER, "tpu", mxt_engine_new(&options, &engine));
  CHECK(engine == NULL && place->frees == 0);
  /* A callback that fails. */
  options.device = NULL;
  place->fails_at = place->rank == 0 ? place->calls + 2 : 0;
  FAILS(MXT_ERROR_PEER, "no answer", mxt_engine_new(&options, &engine));
  CHECK(place->aborts == 1 && place->frees == 0);
  return 0;
}

/* Trains until another one is missed; saves now and then. */
static int until_one_is_missed(struct place *place) {
  mxt_engine *engine = engine_of(place);
  mxt_model *model = new_model(engine);
  mxt_dataset *dataset = new_dataset();
  mxt_trainer *trainer = NULL;
  mxt_trainer_options options = small_options();
  mxt_eval_stats eval;
  eval.struct_size = sizeof eval;
  mxt_status status = mxt_trainer_new(model, &options, &trainer);
  while (status == MXT_OK) {
    if (place->rank == 1 && shared->phase == 0) shared->phase = 1;
    status = mxt_trainer_step(trainer, dataset, NULL);
    if (status == MXT_OK) status = mxt_trainer_eval(trainer, dataset, 2, &eval);
    if (status == MXT_OK) status = mxt_trainer_save(trainer, in_folder(folder, "killed"));
    if (place->rank == 1 && status == MXT_OK) shared->phase = 2;
  }
  RETURNS(MXT_ERROR_PEER, status);
  if (trainer != NULL) RETURNS(MXT_ERROR_PEER, mxt_trainer_save(trainer, folder));
  mxt_trainer_free(trainer);
  mxt_dataset_free(dataset);
  mxt_model_free(model);
  mxt_engine_free(engine);
  return 0;
}

int main(int argc, char **argv) {
  CHECK(argc == 2);
  folder = argv[1];
  pid_t pids[MOST_RANKS];
  int codes[MOST_RANKS];
  shared = mmap(NULL, sizeof *shared, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  CHECK(shared != MAP_FAILED);
  struct meeting *one = new_meeting(1);
  start_ranks(one, alone, pids);
  end_ranks(one, pids, codes);
  CHECK(codes[0] == 0);
  float expected[STEPS + 1];
  memcpy(expected, shared->losses[0], sizeof expected);
  for (uint32_t size = 2; size <= MOST_RANKS; size += 2) {
    struct meeting *meeting = new_meeting(size);
    start_ranks(meeting, trains, pids);
    end_ranks(meeting, pids, codes);
    for (uint32_t rank = 0; rank < size; rank++) {
      CHECK(codes[rank] == 0);
      CHECK(memcmp(shared->losses[rank], expected, sizeof expected) == 0);
    }
    char paths[2][4096];
    snprintf(paths[0], sizeof paths[0], "%s", in_folder(folder, "alone"));
    snprintf(paths[1], sizeof paths[1], "%s", in_folder(folder, "ranks"));
    check_same_file(paths[0], paths[1], "model.safetensors");
    check_same_file(paths[0], paths[1], "trainer.safetensors");
    check_same_file(paths[0], paths[1], "trainer.json");
    munmap(meeting, sizeof *meeting);
    meeting = new_meeting(size);
    start_ranks(meeting, shards, pids);
    end_ranks(meeting, pids, codes);
    for (uint32_t rank = 0; rank < size; rank++) {
      CHECK(codes[rank] == 0);
      CHECK(memcmp(shared->losses[rank], expected, sizeof expected) == 0);
    }
    for (int copied = 0; copied < 2; copied++) {
      const char *name = copied ? "copied" : "sharded";
      snprintf(paths[1], sizeof paths[1], "%s", in_folder(folder, name));
      check_same_file(paths[0], paths[1], "model.safetensors");
      check_same_file(paths[0], paths[1], "trainer.safetensors");
      check_same_file(paths[0], paths[1], "trainer.json");
    }
    munmap(meeting, sizeof *meeting);
  }
  struct meeting *meeting = new_meeting(2);
  start_ranks(meeting, is_refused, pids);
  end_ranks(meeting, pids, codes);
  CHECK(codes[0] == 0 && codes[1] == 0);
  munmap(meeting, sizeof *meeting);

  /* Killed at some instant of its work: the others say so soon, and the checkpoint is whole. */
  for (int i = 0; i < KILLS; i++) {
    meeting = new_meeting(3);
    shared->phase = 0;
    start_ranks(meeting, until_one_is_missed, pids);
    const struct timespec instant = {0, 300000L * i}, moment = {0, 1000000};
    while (shared->phase < 1 + i % 2) nanosleep(&moment, NULL);
    nanosleep(&instant, NULL);
    const int victim = i % 3;
    CHECK(kill(pids[victim], SIGKILL) == 0);
    if (i >= MISSED_LATE) __atomic_store_n(&meeting->is_dead, 1, __ATOMIC_RELEASE);
    end_ranks(meeting, pids, codes);
    for (int rank = 0; rank < 3; rank++) CHECK(codes[rank] == (rank == victim ? -SIGKILL : 0));
    munmap(meeting, sizeof *meeting);
  }
  mxt_engine *engine = new_engine();
  mxt_trainer *trainer = NULL;
  OK(mxt_trainer_load(engine, in_folder(folder, "killed"), &trainer));
  CHECK(mxt_trainer_steps_done(trainer) > 0);
  mxt_trainer_free(trainer);
  mxt_engine_free(engine);
  return 0;
}
