// fastllm._cpu: Python's doors into the CPU kernels. The doors of each op stand in bind_<op>.cpp.
#include "bindings.h"

#include "parallel.h"

namespace fastllm::cpu {

void bind_attention(py::module_& m);
void bind_limits(py::module_& m);
void bind_rms_norm(py::module_& m);

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
  m.def("thread_runtime", &thread_runtime);
  m.def("set_thread_runtime", [](const std::string& name) {
    FASTLLM_CHECK(set_thread_runtime(name.c_str()), "fastllm: thread runtime '", name,
                  "' is not available, expected 'pool', or 'openmp' where PyTorch has loaded an OpenMP runtime");
  });
  // True if tensors cross through DLPack's C exchange API, false if through Python attributes.
  m.def("use_exchange_api", [](bool enabled) { return Boundary::get().use_exchange_api(enabled); });
  bind_attention(m);
  bind_limits(m);
  bind_rms_norm(m);
}

}  // namespace fastllm::cpu
