#include "bindings/from_python.h"

#include <map>

#include "bindings/cuda_run.h"

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
  if (d.contains("dilation")) std::tie(window.dilation_h, window.dilation_w) = pair("dilation");
  return window;
}

Op op_from(const std::string& name) {
  static const std::map<std::string, Op> ops = {
      {"conv2d", Op::kConv2d},
      {"linear", Op::kLinear},
      {"maxpool2d", Op::kMaxPool2d},
      {"avgpool2d", Op::kAvgPool2d},
      {"adaptivemaxpool2d", Op::kAdaptiveMaxPool2d},
      {"adaptiveavgpool2d", Op::kAdaptiveAvgPool2d},
      {"pad2d", Op::kPad2d},
      {"upsamplenearest2d", Op::kUpsampleNearest2d},
      {"upsamplebilinear2d", Op::kUpsampleBilinear2d},
      {"pixelshuffle", Op::kPixelShuffle},
      {"pixelunshuffle", Op::kPixelUnshuffle},
      {"scale2d", Op::kScale2d},
      {"groupnorm", Op::kGroupNorm},
      {"scale", Op::kScale},
      {"layernorm", Op::kLayerNorm},
      {"softmax", Op::kSoftmax},
      {"logsoftmax", Op::kLogSoftmax},
  };
  const auto found = ops.find(name);
  if (found == ops.end()) throw py::value_error("no operation named '" + name + "'");
  return found->second;
}

void read_pool(const py::dict& d, StepSpec& spec) {
  if (d.contains("output_size")) {
    std::tie(spec.pool_h, spec.pool_w) = d["output_size"].cast<std::pair<int64_t, int64_t>>();
    return;
  }
  spec.pool = window_from(d);
  if (d.contains("counts_padding")) spec.counts_padding = d["counts_padding"].cast<bool>();
  if (d.contains("divisor")) spec.divisor = d["divisor"].cast<int64_t>();
}

void read_padding(const py::dict& d, StepSpec& spec) {
  static const std::map<std::string, PadMode> modes = {{"constant", PadMode::kConstant},
                                                       {"reflect", PadMode::kReflect},
                                                       {"replicate", PadMode::kReplicate},
                                                       {"circular", PadMode::kCircular}};
  spec.pad_mode = modes.at(d["mode"].cast<std::string>());
  spec.pad_value = d["value"].cast<float>();
  std::tie(spec.pad_left, spec.pad_right, spec.pad_top, spec.pad_bottom) =
      d["padding"].cast<std::tuple<int64_t, int64_t, int64_t, int64_t>>();
}

void read_moments(const py::dict& d, StepSpec& spec) {
  spec.eps = d["eps"].cast<double>();
  if (d.contains("groups")) spec.groups = d["groups"].cast<int64_t>();
  if (d.contains("features")) spec.in = d["features"].cast<int64_t>();
}

Resize resize_from(const py::dict& d) {
  Resize resize;
  std::tie(resize.h, resize.w) = d["size"].cast<std::pair<int64_t, int64_t>>();
  std::tie(resize.factor_h, resize.factor_w) = d["factors"].cast<std::pair<double, double>>();
  resize.recomputes_factors = d["recomputes_factors"].cast<bool>();
  resize.aligns_corners = d["aligns_corners"].cast<bool>();
  return resize;
}

Activation activation_from(const std::string& name) {
  static const std::map<std::string, Activation> kinds = {
      {"none", Activation::kNone},
      {"relu", Activation::kRelu},
      {"leaky_relu", Activation::kLeakyRelu},
      {"prelu", Activation::kPrelu},
      {"elu", Activation::kElu},
      {"selu", Activation::kSelu},
      {"celu", Activation::kCelu},
      {"hardtanh", Activation::kHardtanh},
      {"hardswish", Activation::kHardswish},
      {"hardsigmoid", Activation::kHardsigmoid},
      {"sigmoid", Activation::kSigmoid},
      {"tanh", Activation::kTanh},
      {"silu", Activation::kSilu},
      {"gelu", Activation::kGelu},
      {"gelu_tanh", Activation::kGeluTanh},
      {"softplus", Activation::kSoftplus},
      {"mish", Activation::kMish},
  };
  const auto found = kinds.find(name);
  if (found == kinds.end()) throw py::value_error("no activation named '" + name + "'");
  return found->second;
}

}  // namespace

StepSource step_from(const py::dict& d) {
  StepSource step;
  step.spec.name = d["name"].cast<std::string>();
  step.spec.op = op_from(d["op"].cast<std::string>());
  step.spec.activation.kind = activation_from(d["activation"].cast<std::string>());
  step.spec.activation.a = d["a"].cast<float>(), step.spec.activation.b = d["b"].cast<float>();
  step.spec.activation_is_in_place = d["activation_in_place"].cast<bool>();
  if (step.spec.op == Op::kConv2d) {
    const py::dict conv = d["conv"];
    step.spec.conv = window_from(conv);
    step.pads_same = conv["same"].cast<bool>();
    step.spec.groups = conv["groups"].cast<int64_t>();
  }
  step.has_one_dimension = d["dimensions"].cast<int>() == 1;
  if (!d["pool"].is_none()) {
    read_pool(d["pool"], step.spec);
    step.spec.has_pool = step.spec.op == Op::kConv2d;
    step.spec.pools_before_activation = d["activation_after_pool"].cast<bool>();
  }
  if (d.contains("pad")) read_padding(d["pad"], step.spec);
  if (d.contains("moments")) read_moments(d["moments"], step.spec);
  if (d.contains("resize")) step.spec.resize = resize_from(d["resize"]);
  if (d.contains("factor")) step.spec.factor = d["factor"].cast<int64_t>();
  if (d.contains("unflattened")) step.spec.unflattened = d["unflattened"].cast<std::vector<int64_t>>();
  step.spec.is_per_feature = d.contains("is_per_feature");
  if (!d["layer"].is_none()) step.layer = d["layer"].cast<int>();
  if (!d["slopes"].is_none()) step.slopes = d["slopes"].cast<int>();
  if (!d["norm"].is_none()) step.norm = d["norm"].cast<int>(), step.norm_eps = d["eps"].cast<double>();
  step.needs_batch =
      step.norm >= 0 || step.slopes >= 0 || d.contains("resize") || d.contains("unflattened") || d["needs_batch"].cast<bool>();
  return step;
}

py::list describe_steps(const std::vector<StepInfo>& infos) {
  py::list steps;
  for (const StepInfo& info : infos) {
    py::dict d;
    d["name"] = info.name, d["kernel"] = info.kernel, d["output"] = info.output;
    d["flops"] = info.flops, d["packed_bytes"] = info.packed_bytes, d["note"] = info.note;
    steps.append(d);
  }
  return steps;
}

namespace {

const char* name_of(Operand::Place place) {
  switch (place) {
    case Operand::Place::kSrc:
      return "input";
    case Operand::Place::kDst:
      return "output";
    case Operand::Place::kArena:
      return "arena";
    case Operand::Place::kHeld:
      return "library";
  }
  return "";
}

const char* name_of(cuda::PoolMode mode) {
  return mode == cuda::PoolMode::kNone ? "none" : mode == cuda::PoolMode::kRegisters ? "registers" : "shared";
}

py::dict describe_launch(const CudaLaunch& launch) {
  py::dict d;
  d["kernel"] = launch.kernel, d["step"] = launch.step, d["packed"] = launch.packed;
  d["src"] = name_of(launch.src.place), d["dst"] = name_of(launch.dst.place);
  d["src_offset"] = launch.src.offset, d["dst_offset"] = launch.dst.offset;
  switch (launch.kind) {
    case CudaLaunch::Kind::kConv:
      d["kind"] = "conv";
      d["pool"] = name_of(launch.conv.pool_mode);
      d["tile"] = py::make_tuple(launch.conv.tile_h, launch.conv.tile_w);
      d["shared_bytes"] = launch.conv_kernel->shared_bytes;
      d["min_arch"] = launch.conv_kernel->min_arch;
      break;
    case CudaLaunch::Kind::kChain:
      d["kind"] = "chain";
      d["layers"] = launch.chain.count;
      d["shared_bytes"] = launch.chain_kernel->shared_bytes(launch.chain);
      d["min_arch"] = launch.chain_kernel->min_arch;
      break;
    case CudaLaunch::Kind::kPool:
      d["kind"] = "pool";
      break;
    case CudaLaunch::Kind::kCudnnConv:
      d["kind"] = "cudnn";
      break;
    case CudaLaunch::Kind::kCublasLinear:
      d["kind"] = "cublas";
      break;
  }
  return d;
}

cuda::DeviceProperties device_from(const py::dict& d) {
  cuda::DeviceProperties device;
  device.major = d["major"].cast<int>(), device.minor = d["minor"].cast<int>();
  device.multiprocessors = d["multiprocessors"].cast<int>();
  device.shared_bytes_per_block = d["shared_bytes_per_block"].cast<int64_t>();
  device.l2_bytes = d["l2_bytes"].cast<int64_t>();
  return device;
}

}  // namespace

py::list cuda_kernels() {
  py::list list;
  const cuda::Engine* const engine = cuda::engine();
  if (!engine) return list;
  const auto add = [&](const char* name, const char* op, cuda::Math math, int min_arch) {
    py::dict d;
    d["name"] = name, d["op"] = op, d["math"] = cuda::name_of(math), d["min_arch"] = min_arch;
    list.append(d);
    return d;
  };
  for (const auto& table : engine->conv)
    for (const cuda::ConvKernel& kernel : table) {
      const py::dict d = add(kernel.name, "conv2d", kernel.math, kernel.min_arch);
      d["threads"] = kernel.threads, d["shared_bytes"] = kernel.shared_bytes;
      d["is_vector"] = kernel.is_vector, d["tile"] = py::make_tuple(kernel.tile_m, kernel.tile_n);
    }
  for (const cuda::ChainKernel& kernel : engine->chain) {
    const char* op = kernel.op == cuda::ChainOp::kTinyMlp    ? "tiny_mlp"
                     : kernel.op == cuda::ChainOp::kFusedMlp ? "fused_mlp"
                                                             : "skinny_linear";
    const py::dict d = add(kernel.name, op, kernel.math, kernel.min_arch);
    d["threads"] = kernel.threads, d["rows"] = kernel.tile_rows, d["max_width"] = kernel.max_width;
  }
  for (const cuda::PoolKernel& kernel : engine->pool) add(kernel.name, "maxpool2d", kernel.math, 75);
  return list;
}

py::dict plan_cuda(const std::vector<py::dict>& steps, const std::vector<std::optional<at::Tensor>>& weights,
                   const std::vector<std::optional<at::Tensor>>& biases, const at::Tensor& input, bool flattens_input,
                   bool flattens_output, const py::dict& device, bool allows_tf32_conv, bool allows_tf32_linear, bool allows_cudnn,
                   bool trusts_cudnn_relu, bool allows_cublas, const std::string& kernel) {
  CudaPlanRequest request;
  request.options.engine = cuda::engine();
  if (!request.options.engine) throw py::value_error("this build of fastseq has no CUDA kernels to plan with");
  std::vector<StepSource> sources;
  for (const py::dict& step : steps) sources.push_back(step_from(step));
  std::vector<ChannelCounts> counts;
  for (const StepSource& source : sources)
    counts.push_back({source.norm >= 0 ? kAnyChannels : 0, source.slopes >= 0 ? kAnyChannels : 0});
  std::vector<at::Tensor> all_weights, all_biases;
  for (const auto& weight : weights) all_weights.push_back(weight.value_or(at::Tensor()));
  for (const auto& bias : biases) all_biases.push_back(bias.value_or(at::Tensor()));
  if (sources.empty() || all_weights.size() != sources.size() || all_biases.size() != sources.size())
    throw py::value_error("plan_cuda expects steps, and as many weights and biases");
  const RunShape shape{!takes_rows(sources.front().spec.op), flattens_input, flattens_output};
  InputView view;
  if (const Reason reason = read_input(input, shape, view)) throw py::value_error(reason);
  request.dtype = input.scalar_type();
  request.allows_tf32_conv = allows_tf32_conv, request.allows_tf32_linear = allows_tf32_linear;
  request.options.device = device_from(device);
  request.options.batch = view.batch;
  request.options.allows_cudnn = allows_cudnn && view.signature.is_spatial;
  request.options.trusts_cudnn_relu = trusts_cudnn_relu;
  request.options.allows_cublas = allows_cublas;
  request.options.forced_kernel = kernel;
  CudaPlanPtr plan;
  try {
    plan = make_cuda_plan(sources, all_weights, all_biases, counts, view.signature, shape, request);
  } catch (const Refusal& refusal) {
    throw py::value_error(refusal.what());
  }
  py::list launches, packs;
  for (const CudaLaunch& launch : plan->launches()) launches.append(describe_launch(launch));
  for (const PackSpec& pack : plan->packs()) {
    py::dict d;
    d["step"] = pack.step, d["elements"] = pack.elements();
    packs.append(d);
  }
  const OutputSpec& output = plan->output();
  py::dict result;
  result["steps"] = describe_steps(plan->describe());
  result["launches"] = launches, result["packs"] = packs;
  result["packs_before"] = plan->packs_before(), result["packing_launch"] = plan->packing_launch();
  result["arena_bytes"] = plan->arena_bytes();
  const Sizes sizes = output_sizes(input, view, shape, output);
  result["output"] = std::vector<int64_t>(sizes.begin(), sizes.end());
  return result;
}

}  // namespace fastseq
