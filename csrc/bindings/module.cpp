// fastseq._C: what Python sees of the engine.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/headeronly/version.h>

#include <chrono>

#include "bindings/frames.h"
#include "bindings/from_python.h"
#include "bindings/lane.h"
#include "bindings/native_run.h"
#include "bindings/program.h"
#include "bindings/watch.h"
#include "kernels/cuda/kernels.h"
#include "plan/memory.h"

#include <fs_cuda_build.h>  // written by setup.py

namespace fastseq {
namespace {

py::object describe(const NativeRun& run) {
  const auto plan = run.describe_last_plan();
  if (!plan) return py::none();
  py::dict result;
  result["steps"] = describe_steps(plan->steps);
  result["scratch_bytes"] = plan->scratch_bytes;
  return result;
}

py::list kernels() {
  py::list list;
  for (const cpu::KernelRow& row : cpu::kernel_rows()) {
    py::dict d;
    d["name"] = row.name, d["op"] = row.op, d["isa"] = row.isa;
    d["dtype"] = row.is_bf16 ? "bf16" : "f32", d["rows"] = row.rows, d["vectors"] = row.vectors;
    d["supported"] = row.is_supported, d["test_only"] = row.is_test_only;
    list.append(d);
  }
  return list;
}

// Best of a few short runs, in GFLOP/s: the fp32 multiply-add peak of one core.
double fma_peak(const std::string& isa) {
  const cpu::KernelSet* set = cpu::select_isa(isa);
  if (!set) throw std::invalid_argument("no kernels for ISA '" + isa + "' on this machine");
  double best = 0;
  float sink = 1.0f;
  for (int repeat = 0; repeat < 10; ++repeat) {
    const auto start = std::chrono::steady_clock::now();
    const double flops = set->fma_probe(1000000, &sink);
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    best = std::max(best, flops / seconds.count() / 1e9);
  }
  return best;
}

py::dict build_info() {
  py::dict info;
  info["torch"] =
      std::to_string(TORCH_VERSION_MAJOR) + "." + std::to_string(TORCH_VERSION_MINOR) + "." + std::to_string(TORCH_VERSION_PATCH);
  info["compiler"] = __VERSION__;
  info["cplusplus"] = static_cast<long>(__cplusplus);
#ifdef NDEBUG
  info["asserts"] = false;
#else
  info["asserts"] = true;
#endif
  const cuda::Engine* engine = cuda::engine();
  info["cuda"] = FS_CUDA_VERSION;    // nvcc's, or ""
  info["cuda_note"] = FS_CUDA_NOTE;  // why there are no CUDA kernels, or ""
  info["cuda_architectures"] = engine ? engine->architectures : "";
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "The native engine of fastseq.";
  m.attr("TORCH_VERSION") = std::to_string(TORCH_VERSION_MAJOR) + "." + std::to_string(TORCH_VERSION_MINOR);
  m.def("build_info", build_info);
  m.def("kernels", kernels, "All compiled kernels, best first.");
  m.def(
      "isa",
      [](const std::string& cap) {
        const cpu::KernelSet* set = cpu::select_isa(cap);
        return set ? std::string(set->isa) : std::string();
      },
      py::arg("cap") = "", "The instruction set that a run would use, '' if `cap` names none.");
  m.def(
      "bf16_isa",
      [](const std::string& cap) {
        const cpu::Bf16Tiles* tiles = cpu::select_bf16(cap);
        return tiles ? std::string(tiles->isa) : std::string();
      },
      py::arg("cap") = "", "That of the tiles that multiply bfloat16 numbers, '' if a run would use none.");
  m.def("cuda_kernels", cuda_kernels, "The compiled CUDA kernels, best first within a family; none in a build without CUDA.");
  m.def("plan_cuda", plan_cuda, py::arg("steps"), py::arg("weights"), py::arg("biases"), py::arg("input"),
        py::arg("flattens_input"), py::arg("flattens_output"), py::arg("device"), py::arg("allows_tf32_conv") = true,
        py::arg("allows_tf32_linear") = false, py::arg("allows_cudnn") = true, py::arg("trusts_cudnn_relu") = true,
        py::arg("allows_cublas") = true, py::arg("kernel") = "",
        "The launches of a run on a CUDA device that need not be there. weights, biases, input: tensors of any device.");
  m.def("set_disabled", set_disabled, py::arg("is_disabled"), "Run all calls of this thread eager; returns what was so before.");
  m.def("is_calling", is_calling, py::arg("ident"), py::arg("code"), py::arg("name"), py::arg("value"),
        "Whether a thread is inside a call of `code` whose local variable `name` is `value`.");
  m.def("install_lane", install_lane, py::arg("type"), py::arg("key"), py::arg("match"),
        "Calls of the type's instances try the program in the slot `lane` of `instance.__dict__[key]`, a `match`, before any "
        "Python.");
  m.def("buffers_made", &AlignedBuffer::made, "Blocks for packed weights and scratch that were allocated in this process so far.");
  m.def("fma_peak", fma_peak, py::arg("isa") = "", py::call_guard<py::gil_scoped_release>());

  py::class_<ModuleWatch, std::shared_ptr<ModuleWatch>>(m, "ModuleWatch")
      .def(py::init<py::object, const std::vector<std::string>&, const std::vector<std::string>&, const std::vector<std::string>&,
                    std::optional<py::tuple>, std::optional<py::tuple>, bool>(),
           py::arg("module"), py::arg("attributes"), py::arg("parameters"), py::arg("buffers") = std::vector<std::string>(),
           py::arg("children") = py::none(), py::arg("names") = py::none(), py::arg("is_owner") = false);

  py::class_<ForwardWatch, std::shared_ptr<ForwardWatch>>(m, "ForwardWatch")
      .def(py::init<py::object, const std::vector<std::tuple<py::object, py::str, py::object>>&>(), py::arg("function"),
           py::arg("names"));

  py::class_<NativeRun, std::shared_ptr<NativeRun>>(m, "NativeRun")
      .def(py::init([](const std::vector<py::dict>& steps, std::vector<std::shared_ptr<ModuleWatch>> watches, bool flattens_input,
                       bool flattens_output, bool flattens_by_view, int64_t rows_features, const std::string& isa,
                       const std::string& kernel, bool checks, bool winograd, bool bfloat16, KernelTimings timings,
                       bool times_kernels) {
             std::vector<StepSource> sources;
             for (const py::dict& step : steps) sources.push_back(step_from(step));
             RunShape shape{!takes_rows(sources.at(0).spec.op), flattens_input, flattens_output, flattens_by_view, rows_features};
             const auto any = [&](bool StepSource::* has) {
               return std::any_of(sources.begin(), sources.end(), [has](const StepSource& s) { return s.*has; });
             };
             shape.needs_batch = any(&StepSource::needs_batch), shape.has_one_dimension = any(&StepSource::has_one_dimension);
             shape.begins_with_conv = sources.front().spec.op == Op::kConv2d;
             shape.unflattened = sources.front().spec.unflattened;
             return std::make_shared<NativeRun>(
                 std::move(sources), std::move(watches), shape,
                 RunOptions{isa, kernel, checks, winograd, bfloat16, std::move(timings), times_kernels});
           }),
           py::arg("steps"), py::arg("watches"), py::arg("flattens_input"), py::arg("flattens_output"),
           py::arg("flattens_by_view") = false, py::arg("rows_features") = 0, py::arg("isa") = "", py::arg("kernel") = "",
           py::arg("checks") = false, py::arg("winograd") = true, py::arg("bfloat16") = false, py::arg("timings") = KernelTimings(),
           py::arg("times_kernels") = false)
      .def("hold", &NativeRun::hold, py::arg("load"), "Answer other threads with the weights of now until `load()` is false.")
      .def("describe", describe, "The plan of the last call, or None.")
      .def("forget_last_plan", &NativeRun::forget_last_plan)
      .def("plans_made", &NativeRun::plans_made)
      .def("packed_bytes", &NativeRun::packed_bytes)
      .def("idle_scratch_bytes", &NativeRun::idle_scratch_bytes, "Scratch on the CPU that is kept for the next calls.")
      .def("reserve_scratch", &NativeRun::reserve_scratch, py::arg("calls"),
           "Make the scratch that as many calls at once need; each input shape has been run before, once at a time.")
      .def("timings", &NativeRun::timings, "Kernels found by timing, by layer; empty for the engine's own choice.")
      .def("leave_to_eager", &NativeRun::leave_to_eager, py::arg("example"),
           "Calls on the CPU with such an input are eager's; the example's data is not read.")
      .def("refresh", &NativeRun::refresh);

  add_program_types(m);
  refuse_globally();  // looks things up once: now, while no other thread can wait for it
}

}  // namespace fastseq
