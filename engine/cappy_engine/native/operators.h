// What an operator's author writes, without ONNX Runtime's ABI: a Kernel made from a Node, called with a Call.
#pragma once
#include <cstdarg>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <initializer_list>
#include <new>

#include "abi.h"

namespace cappy {

// What went wrong, or nothing. Nothing is thrown across the ABI.
struct Error {
  char text[256] = "";
  explicit operator bool() const { return text[0] != 0; }
};

__attribute__((format(printf, 1, 2))) inline Error error(const char* format, ...) {
  Error found;
  va_list values;
  va_start(values, format);
  vsnprintf(found.text, sizeof found.text, format, values);
  va_end(values);
  return found;
}

// A tensor of at most 4 dimensions, which the runtime owns; of the type that the operator names.
struct Tensor {
  void* data = nullptr;
  size_t rank = 0;
  int64_t shape[4] = {0, 0, 0, 0};
  template <class T>
  T* as() const { return static_cast<T*>(data); }
  bool is(const int64_t* wanted, size_t wanted_rank) const;
  bool is(std::initializer_list<int64_t> wanted) const { return is(wanted.begin(), wanted.size()); }
  size_t rows() const;       // a row is the last dimension; those before it count rows
  int64_t& columns() { return shape[rank - 1]; }  // of a tensor that has a dimension
};

// Runs task(data, 0), ..., task(data, count - 1), in any order and on several threads; returns after the last.
struct Parallel {
  void (*run)(const void* context, void (*task)(void*, size_t), size_t count, void* data);
  const void* context;
  size_t threads;  // how many take tasks: work is split for them
  template <class Body>  // body(size_t)
  void each(size_t count, Body&& body) const {
    if (count == 1) return body(size_t{0});
    run(context, [](void* data, size_t task) { (*static_cast<Body*>(data))(task); }, count, const_cast<void*>(static_cast<const void*>(&body)));
  }
};

// All tasks on the calling thread, split as for so many.
inline Parallel one_thread(size_t threads) {
  return {[](const void*, void (*task)(void*, size_t), size_t count, void* data) {
            for (size_t i = 0; i < count; i++) task(data, i);
          },
          nullptr, threads};
}

// An operator's place in a model, when its kernel is made.
class Node {
 public:
  Node(const Api& api, const OrtKernelInfo* info) : api_(api), info_(info) {}
  Error whole(const char* attribute, int64_t* value) const;  // these are errors where there is no such attribute
  Error number(const char* attribute, float* value) const;
  Error constant(size_t input, Tensor* tensor) const;  // an error where the input is not a constant

 private:
  const Api& api_;
  const OrtKernelInfo* info_;
};

// One run of a kernel.
class Call {
 public:
  Call(const Api& api, OrtKernelContext* context, size_t threads) : api_(api), context_(context), threads_(threads) {}
  Error input(size_t place, Tensor* tensor) const;
  Error output(size_t place, const int64_t* shape, size_t rank, Tensor* tensor) const;
  Error output(size_t place, std::initializer_list<int64_t> shape, Tensor* tensor) const {
    return output(place, shape.begin(), shape.size(), tensor);
  }
  Parallel parallel() const;  // on the session's own threads

 private:
  const Api& api_;
  OrtKernelContext* context_;
  size_t threads_;  // of the session
};

class Kernel {
 public:
  virtual ~Kernel() {}
  virtual Error compute(const Call& call) = 0;  // from several threads at once
  size_t threads = 1;  // of the session; whoever makes a kernel says so

  // The C++ library's would be one more thing that a machine must have, and that zig must compile for a minute.
  static void* operator new(size_t bytes, const std::nothrow_t&) noexcept { return malloc(bytes); }
  static void operator delete(void* kernel) { free(kernel); }
};

// An operator of the domain `cappy`: its name, the types of its inputs and outputs, and how its kernel is made.
struct Operator {
  const char* name;
  size_t input_count;
  OrtElementType inputs[8];
  size_t output_count;
  OrtElementType outputs[2];
  Error (*create)(const Node& node, Kernel** kernel);
};

}  // namespace cappy
