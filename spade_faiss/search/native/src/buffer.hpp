// Memory for vectors and codes.
#pragma once

#include <cstddef>
#include <memory>
#include <new>

namespace spade {

// An array that starts on a cache line and begins as zeros. One more cache line behind its end may be read.
template <typename T>
class Buffer {
public:
    explicit Buffer(std::size_t size) : size_(size), data_(new (std::align_val_t(64)) T[size + 64 / sizeof(T)]()) {}
    T* data() { return data_.get(); }
    const T* data() const { return data_.get(); }
    T& operator[](std::size_t i) { return data_.get()[i]; }
    const T& operator[](std::size_t i) const { return data_.get()[i]; }
    std::size_t nbytes() const { return size_ * sizeof(T); }

private:
    struct Free {
        void operator()(T* p) const { ::operator delete[](p, std::align_val_t(64)); }
    };
    std::size_t size_;
    std::unique_ptr<T[], Free> data_;
};

}  // namespace spade
