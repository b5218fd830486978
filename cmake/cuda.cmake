# The CUDA kernels of _C: whether they are built, with which nvcc, for which GPUs.
set(SEDD_CUDA_ARCHS "${CMAKE_CUDA_ARCHITECTURES}" CACHE STRING
    "GPUs to build for, written as in CMAKE_CUDA_ARCHITECTURES: 90, or 80;90a (empty: what suits nvcc's version)")
set(SEDD_CUDA_VERSION "")
file(GLOB SEDD_CUDA_SOURCES CONFIGURE_DEPENDS "${CMAKE_CURRENT_SOURCE_DIR}/csrc/cuda/*.cu")

macro(sedd_cpu_only reason) # leaves this file
  if(SEDD_CUDA STREQUAL "on")
    message(FATAL_ERROR "SEDD_CUDA=on, but ${reason}")
  endif()
  message(STATUS "CUDA: CPU kernels only (${reason})")
  return()
endmacro()

string(TOLOWER "${SEDD_CUDA}" SEDD_CUDA)
if(NOT SEDD_CUDA MATCHES "^(auto|on|off)$")
  message(FATAL_ERROR "SEDD_CUDA: expected auto, on or off, got '${SEDD_CUDA}'")
elseif(SEDD_CUDA STREQUAL "off")
  sedd_cpu_only("off as asked")
elseif(NOT SEDD_CUDA_SOURCES)
  sedd_cpu_only("this version has no CUDA kernels")
endif()

# ---- nvcc: the one that the user names, the one on PATH, or PyPI's in this Python's environment; no other ----
set(SEDD_NVCC nvcc)
if(NOT "$ENV{CUDACXX}" STREQUAL "")
  set(SEDD_NVCC "$ENV{CUDACXX}")
endif()
file(GLOB SEDD_NVCC_PYPI "${Python_SITELIB}/nvidia/cu*/bin")
find_program(CMAKE_CUDA_COMPILER "${SEDD_NVCC}" HINTS ENV CUDA_HOME ENV CUDA_PATH PATHS ${SEDD_NVCC_PYPI}
             PATH_SUFFIXES bin NO_CMAKE_SYSTEM_PATH)
if(NOT CMAKE_CUDA_COMPILER)
  sedd_cpu_only("no ${SEDD_NVCC} on PATH, in CUDA_HOME, CUDA_PATH or the Python environment")
endif()

# ---- architectures: from 80 on ----
execute_process(COMMAND "${CMAKE_CUDA_COMPILER}" --list-gpu-code OUTPUT_VARIABLE SEDD_CUDA_KNOWN)
string(REGEX MATCHALL "sm_([89]|[1-9][0-9])[0-9]" SEDD_CUDA_KNOWN "${SEDD_CUDA_KNOWN}")
list(TRANSFORM SEDD_CUDA_KNOWN REPLACE "sm_" "")
if(NOT SEDD_CUDA_KNOWN)
  sedd_cpu_only("${CMAKE_CUDA_COMPILER} builds for no architecture from 80 on")
endif()
string(REGEX MATCHALL "[^;, ]+" CMAKE_CUDA_ARCHITECTURES "${SEDD_CUDA_ARCHS}")
foreach(arch ${CMAKE_CUDA_ARCHITECTURES})
  string(REGEX REPLACE "^([0-9]+)[af]?(-real|-virtual)?$" "\\1" number "${arch}")
  if(NOT number IN_LIST SEDD_CUDA_KNOWN)
    message(FATAL_ERROR "SEDD_CUDA_ARCHS: '${arch}' is none of ${CMAKE_CUDA_COMPILER}'s: ${SEDD_CUDA_KNOWN}")
  endif()
endforeach()
if(NOT CMAKE_CUDA_ARCHITECTURES)
  # One for each major version: machine code runs on later minor ones too, 80's on 86 and 89. PTX of the newest is for
  # GPUs to come, that of the oldest for those that take no other GPU's machine code (Jetson).
  foreach(arch 80 90 100 120)
    if(arch IN_LIST SEDD_CUDA_KNOWN)
      list(APPEND CMAKE_CUDA_ARCHITECTURES ${arch}-real)
      set(newest ${arch})
    endif()
  endforeach()
  list(APPEND CMAKE_CUDA_ARCHITECTURES 80-virtual ${newest}-virtual)
endif()

# ---- compiler: the C++ compiler's partner; the runtime goes into _C, which then loads without toolkit and driver ----
if("$ENV{CUDAHOSTCXX}" STREQUAL "" AND NOT CMAKE_CUDA_HOST_COMPILER)
  set(CMAKE_CUDA_HOST_COMPILER "${CMAKE_CXX_COMPILER}")
endif()
get_filename_component(SEDD_NVCC_DIR "${CMAKE_CUDA_COMPILER}" DIRECTORY)
if(EXISTS "${SEDD_NVCC_DIR}/../lib/libcudart_static.a") # PyPI's packages have lib where their nvcc looks in lib64
  set(ENV{CUDAFLAGS} "$ENV{CUDAFLAGS} -L${SEDD_NVCC_DIR}/../lib")
endif()
set(CMAKE_CUDA_RUNTIME_LIBRARY Static)
set(CMAKE_CUDA_STANDARD 17)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
set(CMAKE_CUDA_VISIBILITY_PRESET hidden)
enable_language(CUDA)
set(SEDD_CUDA_VERSION "${CMAKE_CUDA_COMPILER_VERSION}")
message(STATUS "CUDA: kernels by nvcc ${SEDD_CUDA_VERSION} (${CMAKE_CUDA_COMPILER}) for ${CMAKE_CUDA_ARCHITECTURES}")

add_library(kernels_cuda OBJECT ${SEDD_CUDA_SOURCES})
# Source lines for compute-sanitizer; compression to a sixth; the unused functions are of NVIDIA's headers (Clang).
target_compile_options(kernels_cuda PRIVATE -lineinfo -Xfatbin=-compress-all -Wno-unused-function)
target_sources(_C PRIVATE csrc/cuda/bindings.cpp $<TARGET_OBJECTS:kernels_cuda>)
target_compile_definitions(_C PRIVATE SEDD_HAS_CUDA)
