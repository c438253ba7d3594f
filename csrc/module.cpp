// Python face of the C++ core. Tensors come as addresses: the core knows nothing of torch, so one build
// serves every torch version. stablekd_fast/kernels checks shapes and types and keeps the tensors alive.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <vector>

#include "augment.h"

namespace py = pybind11;

namespace {

template <class T>
T* at(std::uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

}  // namespace

PYBIND11_MODULE(_C, module) {
    module.doc() = "CPU implementations behind stablekd_fast.kernels; not to be called directly.";

    module.def(
        "augment_batch",
        [](std::uintptr_t images, std::uintptr_t rows, std::uintptr_t offsets, std::uintptr_t flips,
           std::uintptr_t out, std::int64_t batch, std::int64_t height, std::int64_t width, std::int64_t channels,
           std::int64_t padding, const std::vector<float>& mean, const std::vector<float>& std, bool channels_last,
           int threads) {
            stablekd::augment_batch({at<const std::uint8_t>(images), at<const std::int64_t>(rows),
                                     at<const std::int64_t>(offsets), at<const bool>(flips), at<float>(out), batch,
                                     height, width, channels, padding, mean.data(), std.data(), channels_last},
                                    threads);
        },
        py::kw_only(), py::arg("images"), py::arg("rows"), py::arg("offsets"), py::arg("flips"), py::arg("out"),
        py::arg("batch"), py::arg("height"), py::arg("width"), py::arg("channels"), py::arg("padding"),
        py::arg("mean"), py::arg("std"), py::arg("channels_last"), py::arg("threads"),
        py::call_guard<py::gil_scoped_release>());
}
