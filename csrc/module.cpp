// Python face of the C++ core. Tensors come as addresses: the core knows nothing of torch, so one build
// serves every torch version. stablekd_fast/kernels and stablekd_fast/cache/store.py check shapes and types and keep
// the tensors alive.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "crc32.h"
#include "levels.h"
#include "row_store.h"

namespace py = pybind11;
using namespace stablekd;

namespace {

// An address; 0 for a tensor that is absent.
using Address = std::uintptr_t;

template <class T>
T* at(Address address) {
    return reinterpret_cast<T*>(address);
}

// Address, type (a number of `Type`), and elements from one row to the next.
using Matrix = std::tuple<Address, int, std::int64_t>;
// Samples, outer, channels, inner.
using LayoutNumbers = std::tuple<std::int64_t, std::int64_t, std::int64_t, std::int64_t>;

Layout layout_of(const LayoutNumbers& numbers) {
    const auto& [samples, outer, channels, inner] = numbers;
    return {samples, outer, channels, inner};
}

Logits logits_of(const Matrix& student, const Matrix& teacher, Address indices, std::int64_t kept, Address labels,
                 Address weight, Address gradient, std::int64_t samples, std::int64_t classes, float temperature) {
    const auto& [student_at, student_type, student_stride] = student;
    const auto& [teacher_at, teacher_type, teacher_stride] = teacher;
    return {at<void>(student_at),      static_cast<Type>(student_type), student_stride,    at<void>(teacher_at),
            static_cast<Type>(teacher_type), teacher_stride,            at<std::int64_t>(indices), kept,
            at<std::int64_t>(labels),  at<float>(weight),               at<void>(gradient), samples,
            classes,                   temperature};
}

// The loss, and the first row with a label or index out of range (-1: none).
using LogitsResult = std::pair<double, std::int64_t>;

LogitsResult kd_loss(const Matrix& student, const Matrix& teacher, Address indices, std::int64_t kept, Address labels,
                     Address weight, Address gradient, std::int64_t samples, std::int64_t classes, float temperature,
                     double alpha, double smoothing, double factor, int threads) {
    std::int64_t bad_row = -1;
    const Logits job = logits_of(student, teacher, indices, kept, labels, weight, gradient, samples, classes, temperature);
    const double loss = kernels().kd_loss(job, alpha, smoothing, factor, &bad_row, threads);
    return {loss, bad_row};
}

LogitsResult decoupled_kl(const Matrix& student, const Matrix& teacher, Address labels, Address gradient,
                          std::int64_t samples, std::int64_t classes, float temperature, double alpha, double beta,
                          double factor, int threads) {
    std::int64_t bad_row = -1;
    const Logits job = logits_of(student, teacher, 0, 0, labels, 0, gradient, samples, classes, temperature);
    const double loss = kernels().decoupled_kl(job, alpha, beta, factor, &bad_row, threads);
    return {loss, bad_row};
}

double grouped_kl(const Matrix& student, const Matrix& teacher, Address gradient, std::int64_t samples,
                  std::int64_t classes, float temperature, double threshold, double primary, double binary,
                  double factor, int threads) {
    const Logits job = logits_of(student, teacher, 0, 0, 0, 0, gradient, samples, classes, temperature);
    return kernels().grouped_kl(job, threshold, primary, binary, factor, threads);
}

Features features_of(Address student, int student_type, Address target, int target_type, Address scales,
                     std::int64_t scales_sample_stride, Address gradient, const LayoutNumbers& layout) {
    return {at<void>(student),  static_cast<Type>(student_type), at<void>(target),  static_cast<Type>(target_type),
            at<float>(scales),  scales_sample_stride,            at<void>(gradient), layout_of(layout)};
}

double feature_mse(Address student, int student_type, Address target, int target_type, Address scales,
                   std::int64_t scales_sample_stride, Address gradient, const LayoutNumbers& layout, int normalize,
                   std::optional<double> power, double factor, int threads) {
    const Features job = features_of(student, student_type, target, target_type, scales, scales_sample_stride, gradient, layout);
    return kernels().feature_mse(job, static_cast<Normalize>(normalize), power ? &*power : nullptr, factor, threads);
}

double feature_cosine(Address student, int student_type, Address target, int target_type, Address scales,
                      std::int64_t scales_sample_stride, Address gradient, const LayoutNumbers& layout,
                      bool per_position, double factor, int threads) {
    const Features job = features_of(student, student_type, target, target_type, scales, scales_sample_stride, gradient, layout);
    return kernels().feature_cosine(job, per_position, factor, threads);
}

// Address, type (a number of `Type`), channels, and whether those of a place lie side by side.
using MapNumbers = std::tuple<Address, int, std::int64_t, bool>;

double attention_transfer(const MapNumbers& student, const MapNumbers& target, Address gradient, std::int64_t samples,
                          std::int64_t places, double factor, int threads) {
    const auto& [student_at, student_type, student_channels, student_last] = student;
    const auto& [target_at, target_type, target_channels, target_last] = target;
    const Attention job{at<void>(student_at), static_cast<Type>(student_type), student_channels, student_last,
                        at<void>(target_at),  static_cast<Type>(target_type),  target_channels,  target_last,
                        at<void>(gradient),   samples,                         places};
    return kernels().attention_transfer(job, factor, threads);
}

void batch_norm(Address x, Address residual, Address y, int type, Address weight, Address bias, Address mean,
                Address variance, std::int64_t rows, std::int64_t channels, double epsilon, bool relu, int threads) {
    kernels().batch_norm({at<void>(x), at<void>(residual), at<void>(y), static_cast<Type>(type), at<float>(weight),
                          at<float>(bias), at<float>(mean), at<float>(variance), rows, channels, epsilon, relu},
                         threads);
}

void batch_norm_gradient(Address gradient, Address x, Address y, int type, Address weight, Address mean, Address variance,
                         Address x_gradient, Address residual_gradient, Address weight_gradient, Address bias_gradient,
                         std::int64_t rows, std::int64_t channels, double epsilon, int threads) {
    kernels().batch_norm_gradient(
        {at<void>(gradient), at<void>(x), at<void>(y), static_cast<Type>(type), at<float>(weight), at<float>(mean),
         at<float>(variance), at<void>(x_gradient), at<void>(residual_gradient), at<float>(weight_gradient),
         at<float>(bias_gradient), rows, channels, epsilon},
        threads);
}

void quantize_rows(Address rows, int type, Address codes, int code, Address scales, const LayoutNumbers& layout, int threads) {
    kernels().quantize_rows(at<void>(rows), static_cast<Type>(type), at<void>(codes), static_cast<Type>(code),
                            at<float>(scales), layout_of(layout), threads);
}

void dequantize_rows(Address codes, int code, Address scales, std::int64_t scales_sample_stride, Address values, int type,
                     const LayoutNumbers& layout, int threads) {
    kernels().dequantize_rows(at<void>(codes), static_cast<Type>(code), at<float>(scales), scales_sample_stride,
                              at<void>(values), static_cast<Type>(type), layout_of(layout), threads);
}

bool augment_batch(Address images, std::int64_t count, Address rows, Address offsets, Address flips, Address out, int out_type,
                   std::int64_t batch, std::int64_t height, std::int64_t width, std::int64_t channels,
                   std::int64_t padding, const std::vector<float>& mean, const std::vector<float>& std,
                   bool channels_last, int threads) {
    return kernels().augment_batch({at<std::uint8_t>(images), count, at<std::int64_t>(rows), at<std::int64_t>(offsets), at<bool>(flips),
                             at<void>(out), static_cast<Type>(out_type), batch, height, width, channels, padding,
                             mean.data(), std.data(), channels_last},
                            threads);
}

void stream(Address a, Address b, Address out, std::int64_t count, bool nontemporal, int threads) {
    kernels().stream(at<float>(a), at<float>(b), at<float>(out), count, nontemporal, threads);
}

// Bytes per row and address, for each part of a row.
using PartNumbers = std::vector<std::pair<std::int64_t, Address>>;

std::vector<Part> parts_of(const PartNumbers& numbers) {
    std::vector<Part> parts;
    for (const auto& [bytes, address] : numbers) parts.push_back({bytes, at<std::uint8_t>(address)});
    return parts;
}

std::int64_t submit_rows(RowReader& reader, Address rows, std::int64_t count, Address places, Address checksums,
                         Address seen, Address shards, const PartNumbers& parts, bool always) {
    const Rows tables{at<std::int64_t>(places), at<std::uint32_t>(checksums), at<std::uint8_t>(seen),
                      at<std::int64_t>(shards)};
    return reader.submit(at<std::int64_t>(rows), count, tables, parts_of(parts), always);
}

// Address of slot 0, bytes from one slot to the next, bytes, addresses of the slots and of the output, for each part.
using LyingNumbers = std::vector<std::tuple<Address, std::int64_t, std::int64_t, Address, Address>>;

std::int64_t gather_rows(RowReader& reader, std::int64_t count, const LyingNumbers& numbers) {
    std::vector<Lying> parts;
    for (const auto& [first, stride, bytes, slots, to] : numbers) {
        parts.push_back({at<std::uint8_t>(first), stride, bytes, at<std::int64_t>(slots), at<std::uint8_t>(to)});
    }
    return reader.gather(count, std::move(parts));
}

// A number of `Fault`, the row at fault, errno.
std::tuple<int, std::int64_t, int> wait_rows(RowReader& reader, std::int64_t ticket) {
    const Outcome outcome = reader.wait(ticket);
    return {static_cast<int>(outcome.fault), outcome.row, outcome.error};
}

void checksum_rows(RowReader& reader, Address rows, std::int64_t count, const PartNumbers& parts, Address out) {
    reader.checksum(at<std::int64_t>(rows), count, parts_of(parts), at<std::uint32_t>(out));
}

}  // namespace

PYBIND11_MODULE(_C, module) {
    module.doc() = "CPU implementations behind stablekd_fast.kernels, and the reader of stored rows; not to be called directly.";
    const auto no_gil = py::call_guard<py::gil_scoped_release>();

    module.def("level", [] { return kernels().level; });
    module.def("levels", &levels);
    module.def("use_level", &use_level);
    module.def("kd_loss", &kd_loss, no_gil);
    module.def("decoupled_kl", &decoupled_kl, no_gil);
    module.def("grouped_kl", &grouped_kl, no_gil);
    module.def("feature_mse", &feature_mse, no_gil);
    module.def("feature_cosine", &feature_cosine, no_gil);
    module.def("attention_transfer", &attention_transfer, no_gil);
    module.def("batch_norm", &batch_norm, no_gil);
    module.def("batch_norm_gradient", &batch_norm_gradient, no_gil);
    module.def("quantize_rows", &quantize_rows, no_gil);
    module.def("dequantize_rows", &dequantize_rows, no_gil);
    module.def("augment_batch", &augment_batch, no_gil);
    module.def("stream", &stream, no_gil);

    module.def("crc32c", [](Address data, std::int64_t bytes) { return crc32c(0, at<void>(data), bytes); }, no_gil);
    module.def("crc32c_by_tables", [](Address data, std::int64_t bytes) { return crc32c_by_tables(0, at<void>(data), bytes); },
               no_gil);
    if (has_crc32()) {
        module.def("crc32", [](Address data, std::int64_t bytes) { return crc32(at<void>(data), bytes); }, no_gil);
    }
    py::class_<RowReader>(module, "RowReader")
        .def(py::init<int>())
        .def("submit", &submit_rows)
        .def("gather", &gather_rows)
        .def("wait", &wait_rows, no_gil)
        .def("checksum", &checksum_rows, no_gil);
}
