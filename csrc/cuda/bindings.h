// What every bind_<op>.cpp of the CUDA module needs.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>

#include "../rows.h"
#include "../tensor_caster.h"
#include "launch.h"

namespace fastllm::cuda {

namespace py = pybind11;

// Where a kernel on this tensor is to run: its device, and the stream that PyTorch works on there.
Place place_of(const TensorView& x);

}  // namespace fastllm::cuda
