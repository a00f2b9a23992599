/* Checkpoints without a folder: in memory, and in an archive of the host's, of which every function
 * fails in turn. */
#include "check.h"

enum { MOST = 8, NAME = 64 };

static const char *const CHECKPOINT[] = {"config.json", "model.safetensors", "trainer.json",
                                         "trainer.safetensors"};

/* A file of the archive. */
struct entry {
  char name[NAME];
  unsigned char *bytes;
  size_t size, room;
};

/* An archive: what is committed, and what is being saved. */
struct archive {
  struct entry files[MOST], new_files[MOST];
  size_t count, new_count;
  int calls, fails_at; /* the number of the call that fails, from 1 on; 0: none */
  int is_open, begun, committed, aborted, freed;
  const char *said;
  mxt_files *own;   /* its own handle, to call back */
  mxt_model *model; /* the model that is saved */
  int calls_back;
};

static int fails(struct archive *archive) {
  if (++archive->calls != archive->fails_at) return 0;
  archive->said = "the archive is full";
  return 1;
}

static void clear(struct entry *entries, size_t *count) {
  for (size_t i = 0; i < *count; i++) free(entries[i].bytes);
  *count = 0;
}

static int32_t open_file(void *user_data, const char *name, void **file, uint64_t *size) {
  struct archive *archive = user_data;
  if (fails(archive)) return -1;
  for (size_t i = 0; i < archive->count; i++)
    if (strcmp(archive->files[i].name, name) == 0) {
      *file = &archive->files[i];
      *size = archive->files[i].size;
      archive->is_open++;
      return 0;
    }
  return MXT_NO_SUCH_FILE;
}

static int32_t read_file(void *user_data, void *file, uint64_t offset, void *to, size_t count) {
  const struct entry *entry = file;
  if (fails(user_data)) return 3;
  CHECK(offset <= entry->size && count <= entry->size - offset);
  memcpy(to, entry->bytes + offset, count);
  return 0;
}

static int32_t close_file(void *user_data, void *file) {
  struct archive *archive = user_data;
  const struct entry *entry = file;
  archive->is_open--;
  /* A file that was read is closed whatever this says. */
  const int is_new = entry >= archive->new_files && entry < archive->new_files + MOST;
  if (is_new && fails(archive)) return 1;
  if (is_new && archive->fails_at == 0) CHECK(entry->size == entry->room);
  return is_new ? 0 : -1;
}

static int32_t begin_save(void *user_data) {
  struct archive *archive = user_data;
  if (fails(archive)) return 1;
  archive->begun++;
  CHECK(archive->new_count == 0);
  if (archive->calls_back) {
    mxt_model *loaded = NULL;
    char value = 0;
    RETURNS(MXT_ERROR_BUSY, mxt_model_save_to(archive->model, archive->own, 0));
    RETURNS(MXT_ERROR_BUSY, mxt_files_put(archive->own, "x", &value, 1));
    CHECK(mxt_files_count(archive->own) == 0 && loaded == NULL);
    /* Its memory goes when the call is done. */
    mxt_files_free(archive->own);
    CHECK(archive->freed == 2);
  }
  return 0;
}

static int32_t create_file(void *user_data, const char *name, uint64_t size, void **file) {
  struct archive *archive = user_data;
  struct entry *entry = &archive->new_files[archive->new_count];
  CHECK(archive->new_count < MOST && strlen(name) < NAME && archive->is_open == 0);
  if (fails(archive)) return 1;
  strcpy(entry->name, name);
  entry->size = 0;
  entry->room = (size_t)size;
  CHECK((entry->bytes = malloc(entry->room)) != NULL);
  archive->new_count++;
  archive->is_open++;
  *file = entry;
  return 0;
}

static int32_t write_file(void *user_data, void *file, const void *from, size_t count) {
  struct entry *entry = file;
  if (fails(user_data)) return 1;
  CHECK(count <= entry->room - entry->size);
  memcpy(entry->bytes + entry->size, from, count);
  entry->size += count;
  return 0;
}

static int32_t commit_save(void *user_data) {
  struct archive *archive = user_data;
  CHECK(archive->is_open == 0);
  if (fails(archive)) return 1;
  archive->committed++;
  clear(archive->files, &archive->count);
  memcpy(archive->files, archive->new_files, sizeof archive->files);
  archive->count = archive->new_count;
  archive->new_count = 0;
  return 0;
}

static void abort_save(void *user_data) {
  struct archive *archive = user_data;
  CHECK(archive->is_open == 0);
  archive->aborted++;
  clear(archive->new_files, &archive->new_count);
}

static const char *error_text(void *user_data) { return ((struct archive *)user_data)->said; }

static void free_archive(void *user_data) { ((struct archive *)user_data)->freed++; }

static mxt_file_callbacks callbacks_of(struct archive *archive) {
  mxt_file_callbacks callbacks;
  OK(mxt_file_callbacks_init(&callbacks, sizeof callbacks));
  callbacks.user_data = archive;
  callbacks.open = open_file;
  callbacks.read = read_file;
  callbacks.close = close_file;
  callbacks.begin = begin_save;
  callbacks.create = create_file;
  callbacks.write = write_file;
  callbacks.commit = commit_save;
  callbacks.abort = abort_save;
  callbacks.error = error_text;
  callbacks.user_data_free = free_archive;
  return callbacks;
}

/* The archive has the files of a set in memory, byte for byte. */
static void check_same(const struct archive *archive, const mxt_files *memory) {
  CHECK(archive->count == mxt_files_count(memory));
  for (size_t i = 0; i < archive->count; i++) {
    const void *bytes = NULL;
    size_t count = 0;
    OK(mxt_files_view(memory, archive->files[i].name, &bytes, &count));
    CHECK(count == archive->files[i].size);
    CHECK(memcmp(bytes, archive->files[i].bytes, count) == 0);
  }
}

static int freed_lent;
static void free_lent(void *user_data) {
  freed_lent++;
  free(user_data);
}

/* Files in memory: the folder's bytes, copied or lent, and a run that goes on. */
static void in_memory(mxt_engine *engine, mxt_trainer *trainer, const mxt_dataset *dataset,
                      const char *folder) {
  mxt_files *memory = NULL, *copy = NULL, *lent = NULL;
  const void *bytes = NULL;
  size_t count = 0;
  OK(mxt_files_in_memory(&memory));
  OK(mxt_files_in_memory(&copy));
  OK(mxt_files_in_memory(&lent));
  CHECK(mxt_files_count(memory) == 0 && mxt_files_name(memory, 0) == NULL);
  OK(mxt_files_put(memory, "tokenizer.json", "{}", 2));
  OK(mxt_trainer_save_to(trainer, memory));
  OK(mxt_trainer_save(trainer, folder));
  CHECK(mxt_files_count(memory) == 5 && mxt_files_name(memory, 5) == NULL);
  CHECK(strcmp(mxt_files_name(memory, 2), "tokenizer.json") == 0);
  OK(mxt_files_remove(memory, "tokenizer.json"));
  for (size_t i = 0; i < 4; i++) {
    CHECK(strcmp(mxt_files_name(memory, i), CHECKPOINT[i]) == 0);
    OK(mxt_files_view(memory, CHECKPOINT[i], &bytes, &count));
    FILE *file = fopen(in_folder(folder, CHECKPOINT[i]), "rb");
    unsigned char *same = malloc(count + 1);
    CHECK(file != NULL && same != NULL && fread(same, 1, count + 1, file) == count);
    CHECK(memcmp(same, bytes, count) == 0);
    fclose(file);
    OK(mxt_files_put(copy, CHECKPOINT[i], same, count));
    OK(mxt_files_lend(lent, CHECKPOINT[i], same, count, same, free_lent));
  }

  mxt_trainer *resumed = NULL, *again = NULL;
  mxt_model *model = NULL;
  OK(mxt_trainer_load_from(engine, copy, NULL, &resumed));
  OK(mxt_trainer_load_from(engine, lent, "adamw,moments=int8", &again));
  OK(mxt_model_load_from(engine, lent, &model));
  CHECK(freed_lent == 0);
  OK(mxt_files_remove(lent, CHECKPOINT[0]));
  OK(mxt_files_put(lent, CHECKPOINT[1], NULL, 0));
  CHECK(freed_lent == 2);
  mxt_files_free(lent);
  CHECK(freed_lent == 4);
  const float loss = step(trainer, dataset).loss;
  CHECK(step(resumed, dataset).loss == loss);
  CHECK(mxt_trainer_steps_done(again) + 1 == mxt_trainer_steps_done(trainer));

  /* A model alone: the training state is gone with the save. */
  OK(mxt_model_save_to(model, memory, MXT_STORED_WEIGHTS_BF16));
  CHECK(mxt_files_count(memory) == 2);
  mxt_trainer *none = NULL;
  FAILS(MXT_ERROR_FORMAT, "trainer.json", mxt_trainer_load_from(engine, memory, NULL, &none));
  CHECK(none == NULL && strstr(mxt_engine_last_error(engine), "trainer.json") != NULL);

  FAILS(MXT_ERROR_INVALID_ARGUMENT, "2 others", mxt_files_view(memory, "x", &bytes, &count));
  FAILS(MXT_ERROR_INVALID_ARGUMENT, "\"x\"", mxt_files_remove(memory, "x"));
  FAILS(MXT_ERROR_INVALID_ARGUMENT, "empty", mxt_files_put(memory, "", "x", 1));
  FAILS(MXT_ERROR_INVALID_ARGUMENT, "weights", mxt_model_save_to(model, memory, 77));
  FAILS(MXT_ERROR_UTF8, "name", mxt_files_put(memory, "\xff", "x", 1));
  CHECK(strstr(mxt_files_last_error(memory), "UTF-8") != NULL);

  mxt_snapshot *snapshot = NULL;
  OK(mxt_trainer_snapshot(resumed, &snapshot));
  OK(mxt_snapshot_save_to(snapshot, memory));
  OK(mxt_trainer_save_to(resumed, copy));
  for (size_t i = 0; i < 4; i++) {
    const void *other = NULL;
    size_t other_count = 0;
    OK(mxt_files_view(memory, CHECKPOINT[i], &bytes, &count));
    OK(mxt_files_view(copy, CHECKPOINT[i], &other, &other_count));
    CHECK(count == other_count && memcmp(bytes, other, count) == 0);
  }
  mxt_snapshot_free(snapshot);
  mxt_model_free(model);
  mxt_trainer_free(again);
  mxt_trainer_free(resumed);
  mxt_files_free(copy);
  mxt_files_free(memory);
}

/* What a run's callback sees: the checkpoint of the step before, which it may look at. */
struct seen {
  mxt_files *files;
  size_t most;
};

static int32_t look(void *user_data, const mxt_step_stats *step, const mxt_eval_stats *eval) {
  struct seen *seen = user_data;
  const size_t count = mxt_files_count(seen->files);
  (void)step, (void)eval;
  if (count > seen->most) seen->most = count;
  return 0;
}

static void in_a_run(mxt_engine *engine, mxt_trainer *trainer, const mxt_dataset *dataset) {
  static struct archive archive;
  mxt_file_callbacks callbacks = callbacks_of(&archive);
  mxt_files *memory = NULL, *files = NULL;
  mxt_run_options run;
  mxt_run_result result;
  mxt_trainer *resumed = NULL;
  OK(mxt_files_in_memory(&memory));
  OK(mxt_files_from_callbacks(&callbacks, &files));
  OK(mxt_run_options_init(&run, sizeof run));
  result.struct_size = sizeof result;
  struct seen seen = {memory, 0};
  run.steps = 3;
  run.save_every = 1;
  run.save_files = memory;
  run.on_step = look;
  run.user_data = &seen;
  OK(mxt_trainer_run(trainer, dataset, &run, &result));
  CHECK(seen.most == 4 && result.saved == 1 && result.save_errors == 0);
  OK(mxt_trainer_load_from(engine, memory, NULL, &resumed));
  CHECK(mxt_trainer_steps_done(resumed) == mxt_trainer_steps_done(trainer));
  mxt_trainer_free(resumed);
  /* A checkpoint that fails does not end the run. */
  run.save_files = files;
  run.on_step = NULL;
  archive.fails_at = 5;
  OK(mxt_trainer_run(trainer, dataset, &run, &result));
  CHECK(result.steps == 3 && result.save_errors == 1 && result.saved == 1 && archive.aborted == 1);
  run.save_dir = "x";
  FAILS(MXT_ERROR_INVALID_ARGUMENT, "save_files", mxt_trainer_run(trainer, dataset, &run, &result));
  clear(archive.files, &archive.count);
  mxt_files_free(files);
  mxt_files_free(memory);
}

/* A callback that gives the files, the trainer or the dataset up, or changes what a checkpoint
 * holds. */
struct host {
  mxt_files *files;
  mxt_trainer *trainer;
  mxt_model *model;
  mxt_dataset *dataset;
  int steps, runs_inside;
};

static int32_t free_files(void *user_data, const mxt_step_stats *step, const mxt_eval_stats *eval) {
  (void)eval;
  if (step->step == 2) mxt_files_free(((struct host *)user_data)->files);
  return 0;
}

static int32_t change_at_the_end(void *user_data, const mxt_step_stats *step,
                                 const mxt_eval_stats *eval) {
  struct host *host = user_data;
  float values[16];
  (void)eval;
  if (step->step == 2) return 0;
  for (int i = 0; i < 16; i++) values[i] = 7;
  OK(mxt_trainer_set_lr(host->trainer, 0.5f));
  OK(mxt_model_tensor_write(host->model, "transformer.ln_f.weight", values, 16));
  return 0;
}

static int32_t free_inside(void *user_data, const mxt_step_stats *step,
                           const mxt_eval_stats *eval) {
  struct host *host = user_data;
  (void)step, (void)eval;
  host->steps++;
  if (host->runs_inside > 0) {
    mxt_run_options run;
    OK(mxt_run_options_init(&run, sizeof run));
    run.steps = 9;
    run.on_step = free_inside;
    run.user_data = host;
    host->runs_inside--;
    OK(mxt_trainer_run(host->trainer, host->dataset, &run, NULL));
    return 0;
  }
  mxt_trainer_free(host->trainer);
  return 0;
}

static int32_t fail_to_fill(void *user_data, uint64_t number, uint32_t *tokens, float *weights,
                            size_t length) {
  struct host *host = user_data;
  (void)number, (void)tokens, (void)weights, (void)length;
  mxt_dataset_free(host->dataset);
  return 9;
}

static void fail_in_a_finalizer(void *user_data) {
  (void)user_data;
  mxt_model *model = NULL;
  RETURNS(MXT_ERROR_NULL, mxt_model_load(NULL, "nowhere", &model));
}

static void callbacks_in_a_run(mxt_engine *engine, const mxt_dataset *dataset) {
  static struct archive archive;
  mxt_file_callbacks callbacks = callbacks_of(&archive);
  mxt_run_options run;
  mxt_run_result result;
  mxt_trainer *loaded = NULL;
  struct host host = {0};
  result.struct_size = sizeof result;
  host.model = new_model(engine);
  host.trainer = new_trainer(host.model);
  OK(mxt_run_options_init(&run, sizeof run));
  run.user_data = &host;

  /* Freed files are the run's until it ends. */
  archive.freed = 0;
  OK(mxt_files_from_callbacks(&callbacks, &host.files));
  run.steps = 4;
  run.save_every = 1;
  run.save_files = host.files;
  run.on_step = free_files;
  OK(mxt_trainer_run(host.trainer, dataset, &run, &result));
  CHECK(result.saved == 1 && archive.committed == 4 && archive.freed == 1);
  clear(archive.files, &archive.count);

  /* What the callback changes behind the last checkpoint is saved. */
  OK(mxt_files_in_memory(&host.files));
  run.steps = 1;
  run.save_files = host.files;
  run.on_step = change_at_the_end;
  OK(mxt_trainer_run(host.trainer, dataset, &run, &result));
  CHECK(result.saved == 1);
  OK(mxt_trainer_load_from(engine, host.files, NULL, &loaded));
  mxt_model *model = NULL;
  float value[16];
  OK(mxt_trainer_model(loaded, &model));
  OK(mxt_model_tensor_read(model, "transformer.ln_f.weight", value, 16));
  CHECK(value[0] == 7 && step(loaded, dataset).lr == 0.5f);
  mxt_model_free(model);
  mxt_trainer_free(loaded);
  mxt_files_free(host.files);

  /* The message is that of the call, whatever finalizers do behind it. */
  mxt_dataset *windows = NULL;
  OK(mxt_dataset_from_windows(10, fail_to_fill, &host, fail_in_a_finalizer, &windows));
  host.dataset = windows;
  run.save_files = NULL;
  run.on_step = NULL;
  FAILS(MXT_ERROR_IO, "the callback returned 9",
        mxt_trainer_run(host.trainer, windows, &run, NULL));

  /* A trainer that is given up in a run inside a run makes no step more in either. */
  host.dataset = new_dataset();
  host.runs_inside = 2;
  run.steps = 9;
  run.on_step = free_inside;
  OK(mxt_trainer_run(host.trainer, host.dataset, &run, &result));
  CHECK(host.steps == 3 && result.steps == 1 && result.end == MXT_RUN_END_REQUEST);
  mxt_dataset_free(host.dataset);
  mxt_model_free(host.model);
}

/* The host's functions fail at every call in turn. */
static void in_an_archive(mxt_engine *engine, mxt_trainer *trainer, const mxt_dataset *dataset) {
  static struct archive archive;
  mxt_file_callbacks callbacks = callbacks_of(&archive);
  mxt_files *files = NULL, *memory = NULL, *before = NULL;
  OK(mxt_files_from_callbacks(&callbacks, &files));
  OK(mxt_files_in_memory(&memory));
  OK(mxt_files_in_memory(&before));
  OK(mxt_trainer_save_to(trainer, files));
  OK(mxt_trainer_save_to(trainer, before));
  CHECK(archive.begun == 1 && archive.committed == 1 && archive.aborted == 0);
  check_same(&archive, before);

  step(trainer, dataset);
  OK(mxt_trainer_save_to(trainer, memory));
  mxt_status status;
  do {
    archive.calls = archive.begun = archive.committed = archive.aborted = 0;
    archive.fails_at++;
    status = mxt_trainer_save_to(trainer, files);
    CHECK(archive.is_open == 0 && archive.aborted + archive.committed == archive.begun);
    if (status == MXT_OK) break;
    CHECK(status == MXT_ERROR_IO && archive.calls >= archive.fails_at);
    CHECK(strstr(mxt_trainer_last_error(trainer), "the archive is full") != NULL);
    CHECK(archive.committed == 0 && archive.begun == (archive.fails_at > 1));
    check_same(&archive, before);
  } while (archive.fails_at < 1000);
  CHECK(archive.fails_at > 20 && archive.committed == 1);
  check_same(&archive, memory);

  archive.fails_at = 0;
  do {
    mxt_trainer *loaded = NULL;
    archive.calls = 0;
    archive.fails_at++;
    status = mxt_trainer_load_from(engine, files, NULL, &loaded);
    CHECK(archive.is_open == 0);
    if (status == MXT_OK) {
      CHECK(step(loaded, dataset).loss == step(trainer, dataset).loss);
      mxt_trainer_free(loaded);
      break;
    }
    CHECK(status == MXT_ERROR_IO && loaded == NULL);
    CHECK(strstr(mxt_engine_last_error(engine), "the archive is full") != NULL);
  } while (archive.fails_at < 1000);
  CHECK(archive.fails_at > 20);

  /* What only files in memory have. */
  const void *bytes = NULL;
  size_t count = 0;
  archive.fails_at = 0;
  CHECK(mxt_files_count(files) == 0 && mxt_files_name(files, 0) == NULL);
  FAILS(MXT_ERROR_INVALID_ARGUMENT, "in memory", mxt_files_view(files, "x", &bytes, &count));
  FAILS(MXT_ERROR_INVALID_ARGUMENT, "in memory", mxt_files_put(files, "x", "x", 1));
  FAILS(MXT_ERROR_INVALID_ARGUMENT, "in memory", mxt_files_remove(files, "x"));
  CHECK(archive.freed == 0);
  mxt_files_free(files);
  CHECK(archive.freed == 1);

  /* Functions for one direction only; a number where the host says nothing. */
  mxt_model *model = NULL;
  callbacks.create = NULL;
  callbacks.write = NULL;
  callbacks.begin = NULL;
  callbacks.error = NULL;
  FAILS(MXT_ERROR_NULL, "commit", mxt_files_from_callbacks(&callbacks, &files));
  callbacks.commit = NULL;
  callbacks.abort = NULL;
  OK(mxt_files_from_callbacks(&callbacks, &files));
  OK(mxt_model_load_from(engine, files, &model));
  FAILS(MXT_ERROR_IO, "for writing are NULL", mxt_model_save_to(model, files, 0));
  archive.calls = 0;
  archive.fails_at = 1;
  mxt_model *none = NULL;
  FAILS(MXT_ERROR_IO, "the callback open returned -1", mxt_model_load_from(engine, files, &none));
  archive.fails_at = 0;
  mxt_files_free(files);
  CHECK(archive.freed == 2 && none == NULL);
  callbacks = callbacks_of(&archive);
  callbacks.open = NULL;
  FAILS(MXT_ERROR_NULL, "read", mxt_files_from_callbacks(&callbacks, &files));
  callbacks.read = NULL;
  callbacks.close = NULL;
  FAILS(MXT_ERROR_NULL, "close", mxt_files_from_callbacks(&callbacks, &files));
  callbacks.close = close_file;
  /* What fails frees nothing. */
  CHECK(archive.freed == 2);
  OK(mxt_files_from_callbacks(&callbacks, &files));
  OK(mxt_model_save_to(model, files, 0));
  CHECK(archive.count == 2);
  FAILS(MXT_ERROR_IO, "for reading are NULL", mxt_model_load_from(engine, files, &none));

  /* From a callback, other calls on the files are refused, and a free waits for the call. */
  archive.own = files;
  archive.model = model;
  archive.calls_back = 1;
  OK(mxt_model_save_to(model, files, 0));
  CHECK(archive.freed == 3);
  mxt_model_free(model);
  clear(archive.files, &archive.count);
  mxt_files_free(memory);
  mxt_files_free(before);
}

/* What gives lent bytes back may come to the files again, which are busy then. */
static void put_again(void *user_data) {
  mxt_files **files = user_data;
  if (*files == NULL) return;
  mxt_files *again = *files;
  *files = NULL;
  RETURNS(MXT_ERROR_BUSY, mxt_files_put(again, "new", "x", 1));
  RETURNS(MXT_ERROR_BUSY, mxt_files_remove(again, "config.json"));
}

static void freed_from_within(void) {
  mxt_files *files = NULL;
  OK(mxt_files_in_memory(&files));
  mxt_files *again = files;
  OK(mxt_files_lend(files, "lent", "abc", 3, &again, put_again));
  mxt_files_free(files);
  CHECK(again == NULL);
}

int main(int argc, char **argv) {
  CHECK(argc == 2);
  mxt_engine *engine = new_engine();
  mxt_model *model = new_model(engine);
  mxt_trainer *trainer = new_trainer(model);
  mxt_dataset *dataset = new_dataset();
  char folder[4096];
  snprintf(folder, sizeof folder, "%s/checkpoint", argv[1]);
  step(trainer, dataset);
  in_memory(engine, trainer, dataset, folder);
  in_an_archive(engine, trainer, dataset);
  in_a_run(engine, trainer, dataset);
  callbacks_in_a_run(engine, dataset);
  mxt_trainer_free(trainer);
  mxt_model_free(model);
  mxt_dataset_free(dataset);
  mxt_engine_free(engine);
  freed_from_within();
  return 0;
}
