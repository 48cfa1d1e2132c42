// Python's search_windows: arguments are checked here, computing runs without the GIL.
#include <cmath>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "arguments.hpp"
#include "gallery_module.hpp"
#include "module.hpp"
#include "windows.hpp"

namespace spade {
namespace {

using Rows = py::array_t<std::int64_t, py::array::c_style>;
using Wanted = py::array_t<bool, py::array::c_style>;
using Inside = std::optional<py::array_t<bool, py::array::c_style>>;
using Reach = std::optional<py::array_t<std::int32_t, py::array::c_style>>;

// The memory of an array that is written to, of this shape.
template <typename T>
T* written(py::array& array, const std::vector<py::ssize_t>& shape, const std::string& name) {
    bool is_same = array.ndim() == static_cast<py::ssize_t>(shape.size());
    for (std::size_t axis = 0; is_same && axis < shape.size(); ++axis) is_same = array.shape(axis) == shape[axis];
    require(is_same && array.dtype().equal(py::dtype::of<T>()) && is_contiguous(array) && array.writeable() &&
                reinterpret_cast<std::uintptr_t>(array.data()) % alignof(T) == 0,
            name + " must be (images, queries, k), C-contiguous, aligned and writable");
    return static_cast<T*>(array.mutable_data());
}

// What Python sees as WindowCoding and WindowCodes: they know the SIMD level that they are for.
struct LevelCoding {
    const SimdLevel* level;
    std::shared_ptr<const WindowCoding> coding;
};

struct LevelCodes {
    std::shared_ptr<const WindowCoding> coding;
    WindowCodes codes;
};

LevelCoding make_coding(const std::string& simd_level, const py::array& center, float step, int height, int width,
                        std::vector<std::int32_t> cells) {
    const SimdLevel& level = level_of(simd_level);
    require(level.why_not.empty(), "SIMD level " + simd_level + " does not run here: " + level.why_not);
    require(center.ndim() == 1 && center.shape(0) > 0 && center.shape(0) <= kMostChannels, "center must be (1 to 65536,)");
    const int d = static_cast<int>(center.shape(0));
    require(step >= 0x1p-60f && std::isfinite(step), "step must be 2^-60 or more, and finite");
    require(height > 0 && width > 0 && static_cast<std::int64_t>(height) * width < (1 << 28),
            "maps must be 1 to 2^28 locations");
    for (std::size_t i = 0; i < cells.size(); ++i)
        require(0 <= cells[i] && cells[i] < height * width && (i == 0 || cells[i - 1] < cells[i]),
                "cells must be those of the map, ascending");
    return {&level, std::make_shared<WindowCoding>(d, floats_of(center, {d}, "center must be (d,)"), level.most_window_code,
                                                   step, height, width, std::move(cells))};
}

std::unique_ptr<LevelCodes> make_codes(const LevelCoding& coding, const OwnedGallery& owned, int image, const Inside& inside) {
    const Gallery& gallery = owned.gallery;
    require(gallery.d == coding.coding->d && gallery.locations == coding.coding->locations(),
            "vectors must have the coding's channels and locations");
    require(0 <= image && image < gallery.count / gallery.locations, "there is no such image in the gallery");
    require(!inside || (inside->ndim() == 1 && inside->shape(0) == gallery.locations), "inside must be (locations,)");
    const bool* is_inside = inside ? inside->data() : nullptr;
    const py::gil_scoped_release released;
    return std::unique_ptr<LevelCodes>(new LevelCodes{coding.coding, WindowCodes(*coding.coding, gallery, image, is_inside)});
}

void py_search_windows(const OwnedGallery& owned, const Rows& rows, const LevelCoding& coding,
                       const std::vector<const LevelCodes*>& codes, const Wanted& wanted, const py::array& queries,
                       std::pair<int, int> range, int radius, py::array& sq_dist, py::array& id, const Reach& reach,
                       float margin) {
    const Gallery& gallery = owned.gallery;
    const py::ssize_t count = rows.ndim() == 1 ? rows.shape(0) : 0;
    const Vectors xq = vectors_of(queries, "queries");
    require(xq.type == ElementType::kFloat32 && is_aligned(xq.data) && xq.d == gallery.d && xq.count > 0 &&
                xq.count % gallery.locations == 0,
            "queries must be (images * locations, d) float32, aligned");
    const int images = xq.count / gallery.locations;
    require(count > 0, "rows must be (m,), and not empty");
    for (py::ssize_t i = 0; i < count; ++i)
        require(0 <= rows.at(i) && rows.at(i) < gallery.count / gallery.locations, "rows must be images of the gallery");
    require(static_cast<py::ssize_t>(codes.size()) == count, "there must be codes for each row");
    require(gallery.d == coding.coding->d && gallery.locations == coding.coding->locations(),
            "vectors must have the coding's channels and locations");
    std::vector<const WindowCodes*> of_images;
    for (const LevelCodes* image : codes) {
        require(image && image->coding == coding.coding, "codes must be by this coding");
        of_images.push_back(&image->codes);
    }
    require(wanted.ndim() == 2 && wanted.shape(0) == count && wanted.shape(1) == images, "wanted must be (rows, test images)");
    require(0 <= range.first && range.first < range.second && range.second <= gallery.locations,
            "the range must be of locations, and not empty");
    require(radius >= 0, "radius must be 0 or more");
    require(!reach || (reach->ndim() == 2 && reach->shape(0) == images && reach->shape(1) == gallery.locations),
            "reach must be (test images, locations)");
    require(!reach || coding.coding->cells.empty(), "reach is for codings without cells");
    require(sq_dist.ndim() == 3 && sq_dist.shape(2) >= 1, "sq_dist must be (images, queries, k)");
    const std::vector<py::ssize_t> shape{images, range.second - range.first, sq_dist.shape(2)};
    const WindowHits hits{static_cast<int>(sq_dist.shape(2)), written<float>(sq_dist, shape, "sq_dist"),
                          written<std::int64_t>(id, shape, "id")};
    const std::int64_t* row = rows.data();
    const std::int32_t* reaches = reach ? reach->data() : nullptr;
    const auto* is_wanted = reinterpret_cast<const std::uint8_t*>(wanted.data());
    const py::gil_scoped_release released;
    search_windows(gallery, row, count, *coding.level, *coding.coding, of_images.data(), is_wanted,
                   {xq, images, range.first, range.second, reaches}, radius, hits, margin);
}

}  // namespace

void define_windows(py::module_& module) {
    py::class_<LevelCoding>(module, "WindowCoding")
        .def(py::init(&make_coding), py::arg("simd_level"), py::arg("center"), py::arg("step"), py::arg("height"),
             py::arg("width"), py::arg("cells") = std::vector<std::int32_t>());
    py::class_<LevelCodes>(module, "WindowCodes")
        .def(py::init(&make_codes), py::arg("coding"), py::arg("gallery"), py::arg("image"), py::arg("inside") = py::none())
        .def_property_readonly("nbytes", [](const LevelCodes& self) { return self.codes.nbytes(); });
    module.def(
        "most_window_code", [](const std::string& simd_level) { return level_of(simd_level).most_window_code; },
        py::arg("simd_level"), "The largest magnitude of a code of windows.");
    module.def("search_windows", &py_search_windows, py::arg("gallery"), py::arg("rows"), py::arg("coding"), py::arg("codes"),
               py::arg("wanted"), py::arg("queries"), py::arg("range"), py::arg("radius"), py::arg("sq_dist"), py::arg("id"),
               py::arg("reach") = py::none(), py::arg("margin") = 1.0f,
               "Takes the vectors within windows around a range of locations into the nearest ones found before.");
}

}  // namespace spade
