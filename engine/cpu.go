package engine

import (
	"bufio"
	"cmp"
	"os"
	"runtime"
	"strconv"
	"strings"

	"golang.org/x/sys/cpu"
)

// CPU describes the processor, for records of measurements.
type CPU struct {
	Model    string   `json:"model"`
	Arch     string   `json:"arch"`
	Cores    int      `json:"cores"`
	Features []string `json:"features"`
}

// ThisCPU looks at the processor that the program runs on.
func ThisCPU() CPU {
	c := CPU{Model: cpuModel(), Arch: runtime.GOARCH, Cores: runtime.NumCPU()}
	for _, f := range []struct {
		name string
		has  bool
	}{
		{"avx2", cpu.X86.HasAVX2},
		{"fma", cpu.X86.HasFMA},
		{"avx512f", cpu.X86.HasAVX512F},
		{"avx512bw", cpu.X86.HasAVX512BW},
		{"avx512vnni", cpu.X86.HasAVX512VNNI},
		{"avxvnni", cpu.X86.HasAVXVNNI},
		{"avx512bf16", cpu.X86.HasAVX512BF16},
		{"amx-int8", cpu.X86.HasAMXInt8},
		{"amx-bf16", cpu.X86.HasAMXBF16},
		{"asimd", cpu.ARM64.HasASIMD},
	} {
		if f.has {
			c.Features = append(c.Features, f.name)
		}
	}
	return c
}

func cpuModel() string { return cmp.Or(procValue("/proc/cpuinfo", "model name"), runtime.GOARCH) }

// procValue is the first value of a key in a file of lines "key: value", as the kernel writes them; "" if there is none.
func procValue(path, key string) string {
	f, err := os.Open(path)
	if err != nil {
		return ""
	}
	defer f.Close()
	for s := bufio.NewScanner(f); s.Scan(); {
		if k, v, ok := strings.Cut(s.Text(), ":"); ok && strings.TrimSpace(k) == key {
			return strings.TrimSpace(v)
		}
	}
	return ""
}

func goKernels() string {
	if SIMD && cpu.X86.HasAVX2 {
		return ", with its AVX kernels"
	}
	if !SIMD {
		return "; built without GOEXPERIMENT=simd, so its matrix products run at a fraction of the speed: rebuild with GOEXPERIMENT=simd"
	}
	return ""
}

// AvailableMemory returns the bytes that programs can still take without swapping, as far as the system says so; else 0.
func AvailableMemory() int64 {
	v, ok := strings.CutSuffix(procValue("/proc/meminfo", "MemAvailable"), " kB")
	kb, err := strconv.ParseInt(v, 10, 64)
	if !ok || err != nil {
		return 0
	}
	return kb << 10
}
