/* Memory that is not there: by the engine's limit, and by the system's. The host lives, outputs are
 * not written, and what fits still works. */
#define _GNU_SOURCE
#include "check.h"

#include <stdio.h>
#include <sys/resource.h>

/* AddressSanitizer and valgrind take address space of their own for every thread, and end the
 * program where there is none: the system's limit is tried without them. */
#if defined(__SANITIZE_ADDRESS__)
#define SANITIZED 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define SANITIZED 1
#endif
#endif
#ifndef SANITIZED
#define SANITIZED 0
#endif

/* Bytes of address space in use. */
static size_t in_use(void) {
  unsigned long long pages = 0;
  FILE *file = fopen("/proc/self/statm", "r");
  CHECK(file != NULL && fscanf(file, "%llu", &pages) == 1);
  fclose(file);
  return (size_t)pages * 4096;
}

static void limit_address_space(rlim_t bytes) {
  struct rlimit limit;
  CHECK(getrlimit(RLIMIT_AS, &limit) == 0);
  limit.rlim_cur = bytes;
  CHECK(setrlimit(RLIMIT_AS, &limit) == 0);
}

/* 64 MiB of address space more than now. */
static void the_systems_limit(const mxt_engine *engine, mxt_model *model, mxt_trainer *trainer,
                              const mxt_dataset *dataset) {
  mxt_model_config config = small_config();
  mxt_trainer_options options = small_options();
  mxt_engine_options engine_options;
  mxt_engine *crowd = NULL;
  mxt_model *large = NULL;
  mxt_trainer *other = NULL;

  config.vocab_size = 50257;
  config.channels = 1024;
  options.batch_size = 1 << 17;
  OK(mxt_engine_options_init(&engine_options, sizeof engine_options));
  engine_options.threads = 1000; /* some can be started */
  limit_address_space(in_use() + (64 << 20));
  FAILS(MXT_ERROR_OUT_OF_MEMORY, "smaller", mxt_model_new(engine, &config, &large));
  FAILS(MXT_ERROR_OUT_OF_MEMORY, "smaller", mxt_trainer_new(model, &options, &other));
  FAILS(MXT_ERROR_OUT_OF_MEMORY, "threads", mxt_engine_new(&engine_options, &crowd));
  CHECK(large == NULL && other == NULL && crowd == NULL);
  step(trainer, dataset);
  limit_address_space(RLIM_INFINITY);
}

/* The host's own allocator, which has `most` blocks. */
struct heap {
  size_t out, blocks, most;
  int freed;
};

static void *allocate(void *user_data, size_t bytes, size_t alignment) {
  struct heap *heap = user_data;
  void *memory = NULL;
  CHECK(bytes > 0 && heap->freed == 0);
  if (heap->blocks == heap->most) return NULL;
  CHECK(posix_memalign(&memory, alignment, bytes) == 0);
  memset(memory, 0x5a, bytes);
  heap->blocks++;
  heap->out += bytes;
  return memory;
}

static void deallocate(void *user_data, void *memory, size_t bytes, size_t alignment) {
  struct heap *heap = user_data;
  CHECK((size_t)memory % alignment == 0 && heap->out >= bytes && heap->freed == 0);
  heap->out -= bytes;
  free(memory);
}

static void free_heap(void *user_data) { ((struct heap *)user_data)->freed++; }

static mxt_memory_use memory_of(const mxt_engine *engine) {
  mxt_memory_use memory;
  memory.struct_size = sizeof memory;
  OK(mxt_engine_memory(engine, &memory));
  return memory;
}

/* Every block that the host refuses is an error of the call that needed it. */
static void the_hosts_memory(const mxt_dataset *dataset) {
  mxt_engine_options options;
  const mxt_model_config config = small_config();
  const mxt_trainer_options trainer_options = small_options();
  OK(mxt_engine_options_init(&options, sizeof options));
  options.threads = 1;
  int is_done = 0;
  for (size_t most = 0; !is_done; most++) {
    struct heap heap = {0, 0, most, 0};
    mxt_engine *engine = NULL;
    mxt_model *model = NULL;
    mxt_trainer *trainer = NULL;
    mxt_snapshot *snapshot = NULL;
    options.allocate = allocate;
    options.deallocate = deallocate;
    options.allocator_user_data = &heap;
    options.allocator_user_data_free = free_heap;
    OK(mxt_engine_new(&options, &engine));
    CHECK(memory_of(engine).device_bytes == 0 && memory_of(engine).device_limit > 0);
    mxt_status status = mxt_model_new(engine, &config, &model);
    if (status == MXT_OK) status = mxt_trainer_new(model, &trainer_options, &trainer);
    if (status == MXT_OK) {
      step(trainer, dataset);
      const mxt_memory_use memory = memory_of(engine);
      CHECK(memory.device_bytes == heap.out && memory.device_peak == heap.out);
      CHECK(memory.host_bytes == 0 && memory.host_limit > 0);
      status = mxt_trainer_snapshot(trainer, &snapshot);
    }
    if (status == MXT_OK) {
      const mxt_memory_use memory = memory_of(engine);
      CHECK(memory.host_bytes > 0 && memory.device_bytes + memory.host_bytes == heap.out);
      step(trainer, dataset);
      is_done = 1;
    } else {
      CHECK(status == MXT_ERROR_OUT_OF_MEMORY);
      CHECK(strstr(mxt_last_error(), "allocator") != NULL);
      CHECK(strstr(mxt_last_error(), "bytes are needed for") != NULL);
    }
    /* The engine first: the allocator goes with the last that has memory of it. */
    mxt_engine_free(engine);
    mxt_trainer_free(trainer);
    mxt_model_free(model);
    CHECK(heap.freed == (snapshot == NULL));
    mxt_snapshot_free(snapshot);
    CHECK(heap.freed == 1 && heap.out == 0);
  }
  /* An engine that cannot be made gives nothing back. */
  struct heap heap = {0, 0, 0, 0};
  mxt_engine *engine = NULL;
  options.allocator_user_data = &heap;
  options.deallocate = NULL;
  FAILS(MXT_ERROR_NULL, "deallocate", mxt_engine_new(&options, &engine));
  options.deallocate = deallocate;
  options.device = "tpu";
  FAILS(MXT_ERROR_INVALID_ARGUMENT, "tpu", mxt_engine_new(&options, &engine));
  CHECK(heap.freed == 0 && engine == NULL);
}

int main(int argc, char **argv) {
  CHECK(argc == 2);
  const char *folder = in_folder(argv[1], "checkpoint");
  mxt_model_config config = small_config();
  mxt_trainer_options options = small_options();
  mxt_engine_options engine_options;
  mxt_engine *engine = new_engine(), *limited = NULL;
  mxt_model *model = new_model(engine), *large = NULL, *small = NULL;
  mxt_trainer *trainer = new_trainer(model), *other = NULL;
  mxt_dataset *dataset = new_dataset();
  mxt_memory_plan plan;
  OK(mxt_trainer_save(trainer, folder));
  plan.struct_size = sizeof plan;
  OK(mxt_plan(engine, &config, &options, &plan));

  /* The engine's limit: one byte less than a model with its trainer takes. */
  OK(mxt_engine_options_init(&engine_options, sizeof engine_options));
  engine_options.threads = 1;
  engine_options.memory_limit = plan.total - 1;
  OK(mxt_engine_new(&engine_options, &limited));
  OK(mxt_model_new(limited, &config, &small));
  FAILS(MXT_ERROR_OUT_OF_MEMORY, "limit", mxt_trainer_new(small, &options, &other));
  FAILS(MXT_ERROR_OUT_OF_MEMORY, "limit", mxt_trainer_load(limited, folder, &other));
  config.channels = 512;
  FAILS(MXT_ERROR_OUT_OF_MEMORY, "limit", mxt_model_new(limited, &config, &large));
  CHECK(other == NULL && large == NULL);
  options.batch_size = 1;
  OK(mxt_trainer_new(small, &options, &other));
  step(other, dataset);
  mxt_trainer_free(other);
  mxt_model_free(small);
  mxt_engine_free(limited);

  the_hosts_memory(dataset);
  if (!SANITIZED && getenv("UNDER_VALGRIND") == NULL)
    the_systems_limit(engine, model, trainer, dataset);

  mxt_trainer_free(trainer);
  mxt_model_free(model);
  mxt_dataset_free(dataset);
  mxt_engine_free(engine);
  return 0;
}
