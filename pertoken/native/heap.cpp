// Memory of tensors, so that the room of one fits the next one of its size.
//
// Torch asks glibc for aligned memory (`posix_memalign`). Up to version 2.37 that looks for room of the size and 96 bytes
// more, and cuts off what is left over: a tensor never fits where one of its size has been, and a heap that keeps freed memory
// grows by half (https://sourceware.org/bugzilla/show_bug.cgi?id=14581). Plain `malloc` takes such room again, so the
// alignment is made here.

#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/alignment.h>
#include <torch/library.h>

#include <cstdint>
#include <cstdlib>

namespace {

// The address that `malloc` gave stands in front of the numbers.
constexpr uintptr_t kInFront = sizeof(void*);

void give_back(void* numbers) {
  if (numbers == nullptr) return;
  c10::profiledCPUMemoryReporter().Delete(numbers);
  std::free(static_cast<void**>(numbers)[-1]);
}

struct Heap final : c10::Allocator {
  c10::DataPtr allocate(size_t size) override {
    const c10::Device device(c10::DeviceType::CPU);
    if (size == 0) return {nullptr, nullptr, &give_back, device};
    void* room = std::malloc(size + c10::gAlignment + kInFront);
    TORCH_CHECK_WITH(OutOfMemoryError, room != nullptr, "can't allocate memory: you tried to allocate ", size, " bytes.");
    const uintptr_t first = reinterpret_cast<uintptr_t>(room) + kInFront;
    void* numbers = reinterpret_cast<void*>((first + c10::gAlignment - 1) / c10::gAlignment * c10::gAlignment);
    static_cast<void**>(numbers)[-1] = room;
    c10::profiledCPUMemoryReporter().New(numbers, size);
    return {numbers, numbers, &give_back, device};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &give_back; }
  void copy_data(void* to, const void* from, size_t count) const override { default_copy_data(to, from, count); }
};

// From now on tensors are made in such memory; those that there are keep theirs.
void use_heap() {
  static Heap heap;
  c10::SetCPUAllocator(&heap);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(pertoken, m) { m.def("use_heap", &use_heap); }
