// A device type "chip" (PrivateUse1) with two devices whose memory the CPU must not touch: pages are readable only inside
// `copy_bytes`. It allocates, copies and views; torch_chip.py computes, by copies to the CPU.

#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/autocast_mode.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/Allocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <sys/mman.h>
#include <torch/library.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <mutex>

namespace {

constexpr int kDevices = 2;
constexpr int64_t kTotalBytes = int64_t(1) << 30;
thread_local c10::DeviceIndex current_device = 0;
std::atomic<int64_t> in_use[kDevices], peak[kDevices];

struct Block {
  void* begin;
  size_t bytes;
  c10::DeviceIndex device;
};

size_t in_pages(size_t bytes) {
  size_t page = sysconf(_SC_PAGESIZE);
  return std::max<size_t>(1, (bytes + page - 1) / page) * page;
}

void free_block(void* context) {
  auto* block = static_cast<Block*>(context);
  in_use[block->device] -= block->bytes;
  munmap(block->begin, block->bytes);
  delete block;
}

struct ProtectedAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    auto device = current_device;
    size_t whole = in_pages(bytes);
    void* begin = mmap(nullptr, whole, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    TORCH_CHECK(begin != MAP_FAILED, "chip: out of memory");
    int64_t now = in_use[device] += whole;
    if (now > peak[device]) peak[device] = now;
    return {begin, new Block{begin, whole, device}, &free_block, c10::Device(c10::DeviceType::PrivateUse1, device)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void*, const void*, size_t) const override { TORCH_CHECK(false, "chip: copy_data"); }
};

ProtectedAllocator allocator;
REGISTER_ALLOCATOR(c10::DeviceType::PrivateUse1, &allocator)

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return c10::DeviceType::PrivateUse1; }
  c10::Device exchangeDevice(c10::Device device) const override {
    auto before = getDevice();
    setDevice(device);
    return before;
  }
  c10::Device getDevice() const override { return {c10::DeviceType::PrivateUse1, current_device}; }
  void setDevice(c10::Device device) const override {
    TORCH_CHECK(device.index() < kDevices, "chip: there are ", kDevices, " devices");
    if (device.has_index()) current_device = device.index();
  }
  void uncheckedSetDevice(c10::Device device) const noexcept override {
    if (device.has_index()) current_device = device.index();
  }
  c10::Stream getStream(c10::Device device) const override { return c10::Stream(c10::Stream::DEFAULT, device); }
  c10::Stream getDefaultStream(c10::Device device) const override { return c10::Stream(c10::Stream::DEFAULT, device); }
  c10::Stream exchangeStream(c10::Stream stream) const override { return stream; }
  c10::DeviceIndex deviceCount() const noexcept override { return kDevices; }
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard)

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return kDevices; }
  c10::DeviceIndex getCurrentDevice() const override { return current_device; }
  void setCurrentDevice(c10::DeviceIndex device) const override { current_device = device; }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex device) const override {
    return std::exchange(current_device, device);
  }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex device) const override {
    return std::exchange(current_device, device);
  }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t bytes) const override {
    TORCH_CHECK(storage.nbytes() == 0, "chip: resizing a tensor that has contents");
    storage.set_data_ptr_noswap(allocator.allocate(bytes));
    storage.set_nbytes(bytes);
  }
};

at::Tensor empty(at::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                 std::optional<at::Device> device, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  c10::DeviceGuard guard(device.value_or(c10::Device(c10::DeviceType::PrivateUse1, current_device)));
  return at::detail::empty_generic(size, &allocator, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                   dtype.value_or(at::kFloat), format);
}

at::Tensor empty_strided(at::IntArrayRef size, at::IntArrayRef stride, std::optional<at::ScalarType> dtype,
                         std::optional<at::Layout>, std::optional<at::Device> device, std::optional<bool>) {
  c10::DeviceGuard guard(device.value_or(c10::Device(c10::DeviceType::PrivateUse1, current_device)));
  return at::detail::empty_strided_generic(size, stride, &allocator,
                                           c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                           dtype.value_or(at::kFloat));
}

at::Tensor on_host(const at::Tensor& tensor) {
  auto data = static_cast<char*>(const_cast<void*>(tensor.storage().data()));
  auto options = at::TensorOptions().dtype(tensor.dtype()).device(at::kCPU);
  return at::from_blob(data + tensor.storage_offset() * tensor.itemsize(), tensor.sizes(), tensor.strides(), options);
}

void protect(const at::Tensor& tensor, int how) {
  if (tensor.is_privateuseone() && tensor.storage().nbytes() > 0)
    mprotect(const_cast<void*>(tensor.storage().data()), in_pages(tensor.storage().nbytes()), how);
}

// The only function that touches the memory of a device; either tensor may be on the host.
void copy_bytes(const at::Tensor& from, const at::Tensor& to) {
  static std::mutex one_at_a_time;
  if (to.numel() == 0) return;
  std::lock_guard<std::mutex> lock(one_at_a_time);
  protect(from, PROT_READ | PROT_WRITE);
  protect(to, PROT_READ | PROT_WRITE);
  (to.is_cpu() ? to : on_host(to)).copy_(from.is_cpu() ? from : on_host(from));
  protect(from, PROT_NONE);
  protect(to, PROT_NONE);
}

const at::Tensor& resize(const at::Tensor& self, at::IntArrayRef size, std::optional<at::MemoryFormat>) {
  if (self.sizes() == size) return self;
  auto* tensor = self.unsafeGetTensorImpl();
  tensor->set_sizes_contiguous(size);
  size_t bytes = at::detail::computeStorageNbytesContiguous(size, self.itemsize(), self.storage_offset());
  if (bytes > self.storage().nbytes()) at::detail::getPrivateUse1Hooks().resizePrivateUse1Bytes(self.storage(), bytes);
  return self;
}

at::Tensor& set_storage(at::Tensor& self, at::Storage source, int64_t offset, at::IntArrayRef size,
                        at::IntArrayRef stride) {
  self.unsafeGetTensorImpl()->set_storage_keep_dtype(source);
  self.unsafeGetTensorImpl()->set_storage_offset(offset);
  self.unsafeGetTensorImpl()->set_sizes_and_strides(size, stride);
  return self;
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, library) {
  library.impl("empty.memory_format", TORCH_FN(empty));
  library.impl("empty_strided", TORCH_FN(empty_strided));
  library.impl("as_strided", TORCH_FN(at::native::as_strided_tensorimpl));
  library.impl("view", TORCH_FN(at::native::view));
  library.impl("_reshape_alias", TORCH_FN(at::native::_reshape_alias));
  library.impl("resize_", TORCH_FN(resize));
  library.impl("set_.source_Storage_storage_offset", TORCH_FN(set_storage));
}

TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) { m.fallback(torch::CppFunction::makeFallthrough()); }

TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) {
  KERNEL_PRIVATEUSEONE(mm, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(addmm, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(bmm, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(baddbmm, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(matmul, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(linear, lower_precision_fp)
}

TORCH_LIBRARY(chip, library) {
  library.def("copy(Tensor source, Tensor target) -> ()", [](const at::Tensor& from, const at::Tensor& to) {
    copy_bytes(from, to);
  });
  library.def("register_hooks() -> ()", []() { at::RegisterPrivateUse1HooksInterface(new Hooks()); });
  library.def("device_count() -> int", []() { return int64_t(kDevices); });
  library.def("current_device() -> int", []() { return int64_t(current_device); });
  library.def("set_device(int index) -> ()", [](int64_t index) { current_device = index; });
  library.def("memory(int index) -> int[]", [](int64_t index) {
    return std::vector<int64_t>{in_use[index].load(), peak[index].load(), kTotalBytes};
  });
}

}  // namespace
