// Stands in for NCCL in tests: it checks what it is given, and gets on or not as macros say.
#include <stddef.h>
#include <stdint.h>
#include <unistd.h>

#ifndef VERSION
#define VERSION 22809
#endif
// How often a caller has to ask until what it began is done, and what has come of it then.
#ifndef ASKED
#define ASKED 3
#endif
#ifndef STATE
#define STATE 0
#endif

enum { SUCCESS = 0, INVALID_ARGUMENT = 4, INVALID_USAGE = 5, REMOTE_ERROR = 6, IN_PROGRESS = 7 };

typedef struct {
  unsigned char bytes[128];
} Id;

typedef struct {
  size_t size;
  unsigned magic;
  int version, blocking, cluster_size, least_blocks, most_blocks;
  const char *network;
  int split_share;
} Config;

// What tests look at.
int asked = 0, groups = 0, aborted = 0, finalized = 0, destroyed = 0;
size_t sent = 0, received = 0;

static int communicator, depth = 0;

int ncclGetVersion(int *version) {
  *version = VERSION;
  return SUCCESS;
}

int ncclGetUniqueId(Id *id) {
  for (int i = 0; i < 128; i++) id->bytes[i] = (unsigned char)(i * 7);
  return SUCCESS;
}

const char *ncclGetErrorString(int result) {
  return result == REMOTE_ERROR ? "remote process exited" : "some error";
}

const char *ncclGetLastError(void *of) {
  return of ? "the last words" : "";
}

int ncclCommInitRankConfig(void **made, int ranks, Id id, int rank, Config *config) {
  for (int i = 0; i < 128; i++)
    if (id.bytes[i] != (unsigned char)(i * 7)) return INVALID_ARGUMENT;
  if (config->size != sizeof *config || config->magic != 0xcafebeef || config->version != 21900 ||
      config->blocking != 0 || config->most_blocks != 16 || config->network || rank >= ranks)
    return INVALID_ARGUMENT;
  *made = &communicator;
  return IN_PROGRESS;
}

int ncclCommGetAsyncError(void *of, int *state) {
  if (of != &communicator) return INVALID_ARGUMENT;
  *state = asked++ < ASKED ? IN_PROGRESS : STATE;
  return SUCCESS;
}

int ncclCommFinalize(void *of) {
  finalized += of == &communicator;
  return SUCCESS;
}

int ncclCommDestroy(void *of) {
  destroyed += of == &communicator;
  return SUCCESS;
}

#ifndef LACKS_ABORT
int ncclCommAbort(void *of) {
  aborted += of == &communicator;
#ifdef HANGS
  for (;;) pause();
#endif
  return SUCCESS;
}
#endif

int ncclGroupStart(void) {
  depth++;
  return SUCCESS;
}

int ncclGroupEnd(void) {
  if (depth-- != 1) return INVALID_USAGE;
  groups++;
  asked = 0;
  return IN_PROGRESS;
}

static int queue(size_t *count, size_t bytes, int type, int peer, void *of) {
  if (depth != 1 || type != 1 || of != &communicator) return INVALID_USAGE;
  if (peer == 9) return INVALID_ARGUMENT;
  *count += bytes;
  return IN_PROGRESS;
}

int ncclSend(const void *from, size_t bytes, int type, int peer, void *of, void *stream) {
  (void)from, (void)stream;
  return queue(&sent, bytes, type, peer, of);
}

int ncclRecv(void *to, size_t bytes, int type, int peer, void *of, void *stream) {
  (void)to, (void)stream;
  return queue(&received, bytes, type, peer, of);
}
