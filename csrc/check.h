// The only error path of the compiled modules: a sentence becomes a Python exception.
#pragma once

#include <sstream>
#include <stdexcept>

namespace fastllm {

template <typename... Values>
[[noreturn]] void fail(const Values&... values) {
  std::ostringstream text;
  (text << ... << values);
  throw std::invalid_argument(text.str());  // pybind11 turns this into ValueError
}

}  // namespace fastllm

// FASTLLM_CHECK(x.ndim == 2, "rms_norm: x has rank ", x.ndim, ", expected 2");
#define FASTLLM_CHECK(condition, ...)               \
  do {                                              \
    if (!(condition)) ::fastllm::fail(__VA_ARGS__); \
  } while (0)
