// Python's resample: arguments are checked here, computing runs without the GIL.
#include "arguments.hpp"
#include "module.hpp"
#include "resample.hpp"

namespace spade {
namespace {

AxisTaps taps_of(const py::array& positions, const py::array& weights, py::ssize_t cells) {
    require(positions.ndim() == 2 && positions.shape(0) > 0 && positions.shape(0) < (1 << 20) && positions.shape(1) > 0 &&
                positions.dtype().equal(py::dtype::of<std::int32_t>()) && is_contiguous(positions) &&
                is_aligned(positions.data()),
            "positions must be (pixels, taps) int32, C-contiguous and aligned");
    const float* weight = floats_of(weights, {positions.shape(0), positions.shape(1)}, "weights must be as many as positions,");
    const auto* position = static_cast<const std::int32_t*>(positions.data());
    for (py::ssize_t i = 0; i < positions.size(); ++i)
        require(0 <= position[i] && position[i] < cells, "positions must be those of cells");
    return {static_cast<int>(positions.shape(0)), static_cast<int>(positions.shape(1)), position, weight};
}

py::array_t<float> py_resample(const py::array& maps, const py::array& row_positions, const py::array& row_weights,
                               const py::array& column_positions, const py::array& column_weights) {
    require(maps.ndim() == 3 && maps.shape(0) < (1 << 28) && maps.shape(1) < (1 << 20) && maps.shape(2) < (1 << 20),
            "maps must be (n, h, w)");
    const py::ssize_t n = maps.shape(0), h = maps.shape(1), w = maps.shape(2);
    const float* cells = floats_of(maps, {n, h, w}, "maps must be (n, h, w)");
    const AxisTaps rows = taps_of(row_positions, row_weights, h), columns = taps_of(column_positions, column_weights, w);
    py::array_t<float> out({n, static_cast<py::ssize_t>(rows.length), static_cast<py::ssize_t>(columns.length)});
    float* pixels = out.mutable_data();
    {
        const py::gil_scoped_release released;
        resample(cells, static_cast<int>(n), static_cast<int>(h), static_cast<int>(w), rows, columns, pixels);
    }
    return out;
}

}  // namespace

void define_resample(py::module_& module) {
    module.def("resample", &py_resample, py::arg("maps"), py::arg("row_positions"), py::arg("row_weights"),
               py::arg("column_positions"), py::arg("column_weights"),
               "Maps (n, h, w) resampled to (n, H, W): each pixel of an axis is a sum of cells at (H, taps) positions.");
}

}  // namespace spade
