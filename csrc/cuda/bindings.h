// What every bind_<op>.cpp of the CUDA module needs.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>

#include "../rows.h"
#include "../tensor_caster.h"
#include "int8_output.h"
#include "launch.h"

namespace fastllm::cuda {

namespace py = pybind11;

// Where a kernel on this tensor is to run: its device, and the stream that PyTorch works on there.
Place place_of(const TensorView& x);

// Integers and groups that a kernel of that name fills: rows of K, a scale and a sum for each group of group_size.
Int8Output int8_output(const char* name, const TensorView& data, const TensorView& groups, int64_t rows, int64_t K,
                       int64_t group_size);

}  // namespace fastllm::cuda
