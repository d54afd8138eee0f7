# The kernels' sources, each set with the flags of its own instruction set, and the flags of all: also for the tests.
include(CheckCXXCompilerFlag)
set(sources ${CMAKE_CURRENT_LIST_DIR}/sources)

# Apple's toolchains name the processor elsewhere.
set(processor "${CMAKE_SYSTEM_PROCESSOR}")
if(CMAKE_OSX_ARCHITECTURES)
    set(processor "${CMAKE_OSX_ARCHITECTURES}")
endif()

set(CMAKE_CXX_STANDARD 17)
set(CMAKE_CXX_STANDARD_REQUIRED ON)
set(CMAKE_CXX_EXTENSIONS OFF)
set(CMAKE_CXX_VISIBILITY_PRESET hidden)
set(CMAKE_POSITION_INDEPENDENT_CODE ON)
set(flags -O3 -fno-math-errno -pthread)

# Each set asks the processor for its instructions when it runs; for other processors its file is empty. A compiler that
# does not know the flags compiles the file plainly, and those kernels never run.
set(kernels sparse_matrix portable avx2 avx_vnni evex_vnni avx512 neon neon_i8mm)
list(TRANSFORM kernels REPLACE "(.+)" "${sources}/\\1.cpp")
function(use_instruction_set name)
    string(MAKE_C_IDENTIFIER "compiles_${name}" known)
    list(JOIN ARGN " " joined)
    check_cxx_compiler_flag("${joined}" ${known})
    if(${known})
        set_source_files_properties(${sources}/${name}.cpp PROPERTIES COMPILE_OPTIONS "${ARGN}")
    else()
        message(WARNING "this compiler does not know ${joined}: there will be no kernels for them")
    endif()
endfunction()

set(avx2 -mavx2 -mfma -mf16c -mbmi2 -mpopcnt)
set(avx512 -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512vbmi -mavx512vbmi2 -mavx512vnni -mavx512bf16)
if(processor MATCHES "^(x86_64|AMD64)$")
    use_instruction_set(avx2 ${avx2})
    use_instruction_set(avx_vnni ${avx2} -mavxvnni)
    use_instruction_set(evex_vnni ${avx2} -mavx512f -mavx512vl -mavx512vnni)
    use_instruction_set(avx512 ${avx512} ${avx2})
elseif(processor MATCHES "^(aarch64|arm64)$")
    use_instruction_set(neon -march=armv8.2-a+dotprod)
    use_instruction_set(neon_i8mm -march=armv8.2-a+dotprod+i8mm)
endif()
