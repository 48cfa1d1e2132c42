// Python's search_windows: arguments are checked here, computing runs without the GIL.
#include <utility>

#include "arguments.hpp"
#include "gallery_module.hpp"
#include "module.hpp"
#include "windows.hpp"

namespace spade {
namespace {

using Rows = py::array_t<std::int64_t, py::array::c_style>;
using Wanted = py::array_t<bool, py::array::c_style>;

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

void py_search_windows(const OwnedGallery& owned, const Rows& rows, const Wanted& wanted, const py::array& queries,
                       std::pair<int, int> range, int radius, py::array& sq_dist, py::array& id) {
    const Gallery& gallery = owned.gallery;
    const py::ssize_t count = gallery.count / gallery.locations;
    const Vectors xq = vectors_of(queries, "queries");
    require(xq.type == ElementType::kFloat32 && xq.d == gallery.d && xq.count > 0 && xq.count % gallery.locations == 0,
            "queries must be (images * locations, d) float32");
    const int images = xq.count / gallery.locations;
    require(rows.ndim() == 1 && rows.shape(0) == count, "there must be a row for each image of the gallery");
    for (py::ssize_t image = 0; image < count; ++image)
        require(0 <= rows.at(image) && rows.at(image) < (std::int64_t{1} << 32), "rows must be those of a bank");
    require(wanted.ndim() == 2 && wanted.shape(0) == count && wanted.shape(1) == images,
            "wanted must be (images of the gallery, test images)");
    require(0 <= range.first && range.first < range.second && range.second <= gallery.locations,
            "the range must be of locations, and not empty");
    require(radius >= 0, "radius must be 0 or more");
    require(sq_dist.ndim() == 3 && sq_dist.shape(2) >= 1, "sq_dist must be (images, queries, k)");
    const std::vector<py::ssize_t> shape{images, range.second - range.first, sq_dist.shape(2)};
    const WindowHits hits{static_cast<int>(sq_dist.shape(2)), written<float>(sq_dist, shape, "sq_dist"),
                          written<std::int64_t>(id, shape, "id")};
    const std::int64_t* row = rows.data();
    const auto* is_wanted = reinterpret_cast<const std::uint8_t*>(wanted.data());
    const py::gil_scoped_release released;
    search_windows(gallery, row, is_wanted, {xq, images, range.first, range.second}, radius, hits);
}

}  // namespace

void define_windows(py::module_& module) {
    module.def("search_windows", &py_search_windows, py::arg("gallery"), py::arg("rows"), py::arg("wanted"), py::arg("queries"),
               py::arg("range"), py::arg("radius"), py::arg("sq_dist"), py::arg("id"),
               "Takes the vectors within windows around a range of locations into the nearest ones found before.");
}

}  // namespace spade
