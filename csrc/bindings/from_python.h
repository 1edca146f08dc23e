// What Python describes for the engine, and what the engine describes for Python.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include <optional>
#include <string>
#include <vector>

#include "bindings/run_input.h"
#include "plan/spec.h"

namespace fastseq {

namespace py = pybind11;

StepSource step_from(const py::dict& step);

py::list describe_steps(const std::vector<StepInfo>& infos);

// The compiled CUDA kernels, best first within a family: name, op, math, min_arch, threads, shared_bytes where it is fixed.
py::list cuda_kernels();

// The CUDA plan of a run for a device given by its properties, without running anything: {"steps", "launches", "packs",
// "arena_bytes", "output"}. Throws ValueError with the reason where the run would be refused.
py::dict plan_cuda(const std::vector<py::dict>& steps, const std::vector<std::optional<at::Tensor>>& weights,
                   const std::vector<std::optional<at::Tensor>>& biases, const at::Tensor& input, bool flattens_input,
                   bool flattens_output, const py::dict& device, bool allows_tf32_conv, bool allows_tf32_linear, bool allows_cudnn,
                   bool trusts_cudnn_relu, bool allows_cublas, const std::string& kernel);

}  // namespace fastseq
