// A C++ program that finds the library with CMake.
#include <mxfp4train.h>
#if __has_include(<mxfp4train.hpp>)
#include <mxfp4train.hpp>
#endif

#include <iostream>
#include <memory>
#include <vector>

namespace {
template <auto Free>
struct Deleter {
  template <class T>
  void operator()(T *handle) const {
    Free(handle);
  }
};
using Engine = std::unique_ptr<mxt_engine, Deleter<mxt_engine_free>>;
using Dataset = std::unique_ptr<mxt_dataset, Deleter<mxt_dataset_free>>;
}  // namespace

int main() {
  mxt_engine *engine_handle = nullptr;
  if (mxt_engine_new(nullptr, &engine_handle) != MXT_OK) return 1;
  const Engine engine(engine_handle);
  const std::vector<std::uint32_t> tokens{3, 1, 4, 1, 5};
  mxt_dataset *dataset_handle = nullptr;
  if (mxt_dataset_from_tokens(tokens.data(), tokens.size(), &dataset_handle) != MXT_OK) return 2;
  const Dataset dataset(dataset_handle);
  std::uint32_t most = 0;
  if (mxt_dataset_max_token(dataset.get(), &most) != MXT_OK || most != 5) return 3;
  std::cout << "mxfp4train " << mxt_version() << " on " << mxt_engine_device(engine.get()) << '\n';
  return 0;
}
