// fastseq._C: what Python sees of the engine.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/headeronly/version.h>

#include <chrono>

#include "bindings/native_run.h"
#include "bindings/program.h"
#include "bindings/watch.h"

namespace fastseq {
namespace {

Window window_from(const py::dict& d) {
  Window window;
  const auto pair = [&](const char* name) { return d[name].cast<std::pair<int64_t, int64_t>>(); };
  if (d.contains("kernel_size")) std::tie(window.k_h, window.k_w) = pair("kernel_size");
  std::tie(window.stride_h, window.stride_w) = pair("stride");
  std::tie(window.pad_top, window.pad_left) = pair("padding");
  window.pad_bottom = window.pad_top, window.pad_right = window.pad_left;
  if (d.contains("ceil_mode")) window.ceil_mode = d["ceil_mode"].cast<bool>();
  return window;
}

StepSource step_from(const py::dict& d) {
  StepSource step;
  const auto op = d["op"].cast<std::string>();
  step.spec.name = d["name"].cast<std::string>();
  step.spec.op = op == "conv2d" ? Op::kConv2d : op == "maxpool2d" ? Op::kMaxPool2d : Op::kLinear;
  step.spec.has_relu = d["relu"].cast<bool>();
  step.spec.relu_is_in_place = d["relu_in_place"].cast<bool>();
  if (step.spec.op == Op::kConv2d) {
    const py::dict conv = d["conv"];
    step.spec.conv = window_from(conv);
    step.pads_same = conv["same"].cast<bool>();
  }
  if (!d["pool"].is_none()) {
    step.spec.pool = window_from(d["pool"]);
    step.spec.has_pool = step.spec.op == Op::kConv2d;
    step.spec.pools_before_relu = d["relu_after_pool"].cast<bool>();
  }
  if (!d["layer"].is_none()) step.layer = d["layer"].cast<int>();
  return step;
}

py::object describe(const NativeRun& run) {
  const PlanPtr plan = run.last_plan();
  if (!plan) return py::none();
  py::list steps;
  for (const StepInfo& info : plan->describe()) {
    py::dict d;
    d["name"] = info.name, d["kernel"] = info.kernel, d["output"] = info.output;
    d["flops"] = info.flops, d["packed_bytes"] = info.packed_bytes;
    steps.append(d);
  }
  py::dict result;
  result["steps"] = steps;
  result["scratch_bytes"] = plan->scratch_bytes();
  return result;
}

py::list kernels() {
  py::list list;
  for (const cpu::KernelRow& row : cpu::kernel_rows()) {
    py::dict d;
    d["name"] = row.name, d["op"] = row.op, d["isa"] = row.isa;
    d["rows"] = row.rows, d["vectors"] = row.vectors;
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
  m.def("fma_peak", fma_peak, py::arg("isa") = "", py::call_guard<py::gil_scoped_release>());

  py::class_<ModuleWatch, std::shared_ptr<ModuleWatch>>(m, "ModuleWatch")
      .def(py::init<py::object, const std::vector<std::string>&, const std::vector<std::string>&, std::optional<py::tuple>, bool>(),
           py::arg("module"), py::arg("attributes"), py::arg("parameters"), py::arg("children") = py::none(),
           py::arg("is_owner") = false);

  py::class_<NativeRun, std::shared_ptr<NativeRun>>(m, "NativeRun")
      .def(py::init([](const std::vector<py::dict>& steps, std::vector<std::shared_ptr<ModuleWatch>> watches, bool flattens_input,
                       bool flattens_output, const std::string& isa, const std::string& kernel) {
             std::vector<StepSource> sources;
             for (const py::dict& step : steps) sources.push_back(step_from(step));
             return std::make_shared<NativeRun>(std::move(sources), std::move(watches), flattens_input, flattens_output, isa,
                                                kernel);
           }),
           py::arg("steps"), py::arg("watches"), py::arg("flattens_input"), py::arg("flattens_output"), py::arg("isa") = "",
           py::arg("kernel") = "")
      .def("describe", describe, "The plan of the last call, or None.")
      .def("forget_last_plan", &NativeRun::forget_last_plan)
      .def("plans_made", &NativeRun::plans_made)
      .def("packed_bytes", &NativeRun::packed_bytes)
      .def("refresh", &NativeRun::refresh);

  add_program_types(m);
}

}  // namespace fastseq
