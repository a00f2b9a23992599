/* Loaded at run time, used, and closed again while its worker threads are still ending. */
#define _POSIX_C_SOURCE 200809L
#include "mxfp4train.h"

#include <dlfcn.h>
#include <stdio.h>

#ifndef LIBRARY
#error "pass -DLIBRARY with the path of the shared library"
#endif

int main(void) {
  for (int i = 0; i < 20; i++) {
    mxt_status (*new_engine_)(const mxt_engine_options *, mxt_engine **);
    void (*free_engine)(mxt_engine *);
    uint32_t (*abi)(void);
    mxt_engine *engine = NULL;
    void *library = dlopen(LIBRARY, RTLD_NOW | RTLD_LOCAL);
    if (library == NULL) {
      fprintf(stderr, "%s\n", dlerror());
      return 1;
    }
    *(void **)&new_engine_ = dlsym(library, "mxt_engine_new");
    *(void **)&free_engine = dlsym(library, "mxt_engine_free");
    *(void **)&abi = dlsym(library, "mxt_abi_version");
    if (new_engine_ == NULL || free_engine == NULL || abi == NULL) return 2;
    if (abi() != MXT_ABI_VERSION || new_engine_(NULL, &engine) != MXT_OK) return 3;
    free_engine(engine);
    if (dlclose(library) != 0) return 4;
  }
  return 0;
}
