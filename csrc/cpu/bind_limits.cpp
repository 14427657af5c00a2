#include <vector>

#include "bindings.h"
#include "limits.h"
#include "parallel.h"

namespace fastllm::cpu {

namespace {

Limit limit_named(const std::string& name) {
  for (int i = 0; i < kNumLimits; ++i) {
    if (name == kLimitNames[i]) return static_cast<Limit>(i);
  }
  fail("limit_loop: name is '", name, "', expected read, copy, stream, fp32, int8, int4 or bf16");
}

}  // namespace

void bind_limits(py::module_& m) {
  m.def(
      "limit_loop",
      [](const std::string& name, const TensorView& from, const TensorView& to, const TensorView& tiles,
         int64_t repeats) {
        FASTLLM_CHECK(from.ndim == 2 && from.contiguous_from(0) && from.dtype == DType::f32,
                      "limit_loop: from must be a contiguous (threads, floats) tensor of fp32");
        FASTLLM_CHECK(to.numel() == from.numel() && to.contiguous_from(0) && to.dtype == DType::f32,
                      "limit_loop: to must be a contiguous fp32 tensor as large as from");
        FASTLLM_CHECK(reinterpret_cast<uintptr_t>(to.data) % 64 == 0, "limit_loop: to must start with a cache line");
        FASTLLM_CHECK(from.size(1) % kStreamStep == 0, "limit_loop: from has rows of ", from.size(1),
                      " floats, expected a multiple of ", kStreamStep);
        FASTLLM_CHECK(tiles.numel() == kTileFloats && tiles.contiguous_from(0) && tiles.dtype == DType::f32,
                      "limit_loop: tiles must be ", kTileFloats, " contiguous fp32 values");
        LimitsArgs a{};
        a.limit = limit_named(name);
        a.from = static_cast<const float*>(from.data);
        a.to = static_cast<float*>(to.data);
        a.floats = from.size(1);
        a.tiles = static_cast<const float*>(tiles.data);
        a.repeats = repeats;
        a.threads = static_cast<int>(from.size(0));
        std::vector<float> sums(static_cast<size_t>(a.threads));
        std::vector<int64_t> work(static_cast<size_t>(a.threads));
        a.sums = sums.data();
        a.work = work.data();
        py::gil_scoped_release release;
        limits_kernel(a);
        int64_t total = 0;
        for (const int64_t w : work) total += w;
        return total;
      },
      "(name, from, to, tiles, repeats): runs the loop of one limit on from.shape[0] threads, each with a row of its "
      "own;\n"
      "returns the bytes moved or operations done, 0 where the rung in force has no such instruction");
  m.def("round_trip", &round_trip, py::call_guard<py::gil_scoped_release>(),
        "(seconds): seconds that a cache line takes to another core and back, the best of many trips; needs two cores");
}

}  // namespace fastllm::cpu
