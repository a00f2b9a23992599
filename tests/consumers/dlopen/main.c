/* A program whose plug-in threads load the library, train an engine's worth of threads, and close
 * it again, several at once. Its argument is the library's path. */
#define _POSIX_C_SOURCE 200809L
#include <mxfp4train.h>

#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>

static const char *path;

static void *use(void *argument) {
  int *failed = argument;
  for (int i = 0; i < 10; i++) {
    mxt_status (*new_engine)(const mxt_engine_options *, mxt_engine **);
    void (*free_engine)(mxt_engine *);
    uint32_t (*abi)(void);
    mxt_engine *engine = NULL;
    void *library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (library == NULL) {
      fprintf(stderr, "%s\n", dlerror());
      *failed = 1;
      return NULL;
    }
    *(void **)&new_engine = dlsym(library, "mxt_engine_new");
    *(void **)&free_engine = dlsym(library, "mxt_engine_free");
    *(void **)&abi = dlsym(library, "mxt_abi_version");
    if (abi() != MXT_ABI_VERSION || new_engine(NULL, &engine) != MXT_OK) *failed = 2;
    free_engine(engine);
    if (dlclose(library) != 0) *failed = 3;
  }
  return NULL;
}

int main(int argc, char **argv) {
  pthread_t threads[3];
  int failed[3] = {0, 0, 0};
  if (argc != 2) return 2;
  path = argv[1];
  for (int i = 0; i < 3; i++) {
    if (pthread_create(&threads[i], NULL, use, &failed[i]) != 0) return 3;
  }
  for (int i = 0; i < 3; i++) {
    if (pthread_join(threads[i], NULL) != 0 || failed[i] != 0) return 4;
  }
  return 0;
}
