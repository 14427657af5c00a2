// fastllm._cpu: Python's doors into the CPU kernels. The doors of each op stand in bind_<op>.cpp, generation's in
// bind_generation.cpp.
#include "bindings.h"

#include <chrono>

#include "parallel.h"

namespace fastllm::cpu {

void bind_attention(py::module_& m);
void bind_cross_entropy(py::module_& m);
void bind_embedding(py::module_& m);
void bind_limits(py::module_& m);
void bind_gated_activation(py::module_& m);
void bind_generation(py::module_& m);
void bind_quant_matmul(py::module_& m);
void bind_rms_norm(py::module_& m);
void bind_rotary(py::module_& m);

namespace {

Isa isa_named(const std::string& name) {
  for (int i = 0; i < kNumIsa; ++i) {
    if (name == kIsaNames[i]) return static_cast<Isa>(i);
  }
  fail("fastllm: isa is '", name, "', expected scalar, avx2, avx512, avx512_vnni or avx512_bf16");
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "fastllm's CPU kernels, compiled once an instruction-set rung.";
  Boundary::get().initialise();
  m.attr("kernels") = py::dict();
  m.def("detected_isa", [] { return kIsaNames[static_cast<int>(detect_isa())]; });
  m.def("active_isa", [] { return kIsaNames[static_cast<int>(active_isa())]; });
  m.def("isa_names", [] {
    py::list names;
    for (int i = 0; i <= static_cast<int>(detect_isa()); ++i) names.append(kIsaNames[i]);
    return names;
  });
  m.def("set_isa", [](const std::string& name) {
    const Isa isa = isa_named(name);
    FASTLLM_CHECK(isa <= detect_isa(), "fastllm: isa is '", name, "', expected at most '",
                  kIsaNames[static_cast<int>(detect_isa())], "', the highest rung of this machine");
    set_active_isa(isa);
  });
  m.def("set_past_caches", &set_past_caches,
        "(bytes): results of calls that move more are stored past the caches; returns what it was. For tests.");
  m.def("thread_runtime", &thread_runtime);
  m.def("set_thread_runtime", [](const std::string& name) {
    FASTLLM_CHECK(set_thread_runtime(name.c_str()), "fastllm: thread runtime '", name,
                  "' is not available, expected 'pool', or 'openmp' where PyTorch has loaded an OpenMP runtime");
  });
  // What a kernel would see of a tensor: (address, dtype, on_cpu, device index, shape, strides). For tests.
  m.def("tensor_view", [](const TensorView& x) {
    py::tuple shape(x.ndim), strides(x.ndim);
    for (int i = 0; i < x.ndim; ++i) {
      shape[i] = x.shape[i];
      strides[i] = x.strides[i];
    }
    return py::make_tuple(reinterpret_cast<uintptr_t>(x.data), name(x.dtype), x.on_cpu, x.device_index, shape, strides);
  });
  // True if tensors cross through DLPack's C exchange API, false if through Python attributes.
  m.def("use_exchange_api", [](bool enabled) { return Boundary::get().use_exchange_api(enabled); });
  py::class_<Recording>(m, "Recording", "Kernel calls of this thread between start() and stop(), for replay().")
      .def(py::init<>())
      .def("start", &Recording::start, py::arg("lasts") = py::none(),
           "Every tensor that crosses the boundary from now on is kept alive, but where lasts(address) is true.")
      .def_static("stop", &Recording::stop)
      .def("__len__", [](const Recording& recording) { return recording.calls.size(); })
      .def("replay",
           [](const Recording& recording) {
             py::gil_scoped_release release;
             const OnPool threads;
             for (const auto& call : recording.calls) call.run();
           })
      .def("kernels",
           [](const Recording& recording) {
             std::vector<const char*> names;
             for (const auto& call : recording.calls) names.push_back(call.kernel);
             return names;
           })
      .def(
          "timed_replay",
          [](const Recording& recording) {
            using Clock = std::chrono::steady_clock;
            std::vector<std::pair<const char*, double>> took;
            const OnPool threads;
            for (const auto& call : recording.calls) {
              const Clock::time_point start = Clock::now();
              call.run();
              took.emplace_back(call.kernel, std::chrono::duration<double>(Clock::now() - start).count());
            }
            return took;
          },
          "replay(), and each call's kernel and seconds");
  bind_attention(m);
  bind_cross_entropy(m);
  bind_embedding(m);
  bind_limits(m);
  bind_gated_activation(m);
  bind_generation(m);
  bind_quant_matmul(m);
  bind_rms_norm(m);
  bind_rotary(m);
}

}  // namespace fastllm::cpu
