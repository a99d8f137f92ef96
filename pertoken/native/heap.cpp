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

// In front of the numbers stand a mark and the address that `malloc` gave. Tensors in oneDNN's own layouts are freed by the allocator
// of the day, those among them that torch's own had made: they have no mark, and are their own address.
constexpr uintptr_t kInFront = 2 * sizeof(uintptr_t);

uintptr_t mark_of(const void* numbers) { return reinterpret_cast<uintptr_t>(numbers) ^ 0x9e3779b97f4a7c15u; }

void give_back(void* numbers) {
  if (numbers == nullptr) return;
  c10::profiledCPUMemoryReporter().Delete(numbers);
  uintptr_t* end = static_cast<uintptr_t*>(numbers);
  if (end[-2] != mark_of(numbers)) return std::free(numbers);
  end[-2] = 0;
  std::free(reinterpret_cast<void*>(end[-1]));
}

struct Heap final : c10::Allocator {
  c10::DataPtr allocate(size_t size) override {
    const c10::Device device(c10::DeviceType::CPU);
    if (size == 0) return {nullptr, nullptr, &give_back, device};
    void* room = std::malloc(size + c10::gAlignment + kInFront);
    TORCH_CHECK_WITH(OutOfMemoryError, room != nullptr, "can't allocate memory: you tried to allocate ", size, " bytes.");
    const uintptr_t first = reinterpret_cast<uintptr_t>(room) + kInFront;
    void* numbers = reinterpret_cast<void*>((first + c10::gAlignment - 1) / c10::gAlignment * c10::gAlignment);
    static_cast<uintptr_t*>(numbers)[-1] = reinterpret_cast<uintptr_t>(room);
    static_cast<uintptr_t*>(numbers)[-2] = mark_of(numbers);
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
