#include "emulation.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <vector>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace attnrb::cuda {
namespace emulation {

ATTNRB_EMULATION_LOCAL __thread Lane current;

void fail(const char* format, ...) {
  std::fflush(stdout);
  std::fprintf(stderr, "emulated device: block %lld, thread %d: ", static_cast<long long>(current.block),
               current.thread);
  va_list arguments;
  va_start(arguments, format);
  std::vfprintf(stderr, format, arguments);
  va_end(arguments);
  std::fputc('\n', stderr);
  std::abort();
}

namespace {

#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kStackBytes = 256 * 1024;
#else
constexpr size_t kStackBytes = 64 * 1024;
#endif
// Stacks lie an odd number of cache lines apart: at a power of two, the same variable of all fibers would fall into one
// set of the cache.
constexpr size_t kStackSpacing = kStackBytes + 17 * 64;

// Where a fiber stands while another runs. A switch is a dozen instructions; swapcontext() would ask the operating
// system for the signal mask each time.
#if defined(__x86_64__)
extern "C" void attnrb_switch_stacks(void** save, void* load);
__asm__(
    ".text\n"
    ".globl attnrb_switch_stacks\n"
    ".hidden attnrb_switch_stacks\n"
    ".type attnrb_switch_stacks,@function\n"
    "attnrb_switch_stacks:\n"
    "  pushq %rbp\n  pushq %rbx\n  pushq %r12\n  pushq %r13\n  pushq %r14\n  pushq %r15\n"
    "  movq %rsp, (%rdi)\n"
    "  movq %rsi, %rsp\n"
    "  popq %r15\n  popq %r14\n  popq %r13\n  popq %r12\n  popq %rbx\n  popq %rbp\n"
    "  ret\n"
    ".size attnrb_switch_stacks,.-attnrb_switch_stacks\n"
    ".section .note.GNU-stack,\"\",@progbits\n"
    ".text\n");

struct Context {
  void* top = nullptr;
  void prepare(unsigned char* stack, void (*entry)()) {
    void** slot = reinterpret_cast<void**>(stack + kStackBytes - 64);
    *--slot = nullptr;  // entry never returns; the stack is aligned as after a call
    *--slot = reinterpret_cast<void*>(entry);
    for (int i = 0; i < 6; ++i) *--slot = nullptr;
    top = slot;
  }
  static void swap(Context& from, Context& to) { attnrb_switch_stacks(&from.top, to.top); }
};
#else
struct Context {
  ucontext_t context;
  void prepare(unsigned char* stack, void (*entry)()) {
    getcontext(&context);
    context.uc_stack.ss_sp = stack;
    context.uc_stack.ss_size = kStackBytes;
    context.uc_link = nullptr;
    makecontext(&context, entry, 0);
  }
  static void swap(Context& from, Context& to) { swapcontext(&from.context, &to.context); }
};
#endif

// Memory with nothing on either side: a read or write past its end is a fault. Its end is exact; before its begin lie
// up to a page of bytes that are checked afterwards.
class GuardedMemory {
 public:
  explicit GuardedMemory(size_t bytes) : bytes_(bytes) {
    const size_t page = size_t(sysconf(_SC_PAGESIZE));
    inner_ = (bytes + page - 1) / page * page;
    whole_ = inner_ + 2 * page;
    base_ = static_cast<unsigned char*>(mmap(nullptr, whole_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (base_ == MAP_FAILED || mprotect(base_ + page, inner_ > 0 ? inner_ : page, PROT_READ | PROT_WRITE) != 0)
      fail("no memory");
    if (inner_ == 0) mprotect(base_ + page, page, PROT_NONE);
    first_ = base_ + page;
  }
  ~GuardedMemory() { munmap(base_, whole_); }
  GuardedMemory(const GuardedMemory&) = delete;
  GuardedMemory& operator=(const GuardedMemory&) = delete;

  unsigned char* data() const { return first_ + (inner_ - bytes_); }
  size_t size() const { return bytes_; }
  bool contains(const void* pointer, size_t count) const {
    const unsigned char* p = static_cast<const unsigned char*>(pointer);
    return p >= data() && p + count <= data() + bytes_;
  }
  // All bits set is a NaN in every type.
  void poison() { std::memset(first_, 0xff, inner_); }
  void check_margin() const {
    for (const unsigned char* p = first_; p < data(); ++p)
      if (*p != 0xff) fail("shared memory was written before its begin");
  }

 private:
  size_t bytes_, inner_, whole_;
  unsigned char *base_, *first_;
};

struct Copy {
  void* shared;
  const void* global;
  bool valid;
  int64_t group;
};

struct Fiber {
  Context context;
  std::vector<Copy> copies;
  int64_t groups = 0;  // of copies that were committed
};

struct Warp {
  void* arguments[32];
  int arrived = 0;
  const char* what = nullptr;
  int line = 0;
};

struct Block {
  int threads = 0;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::vector<int> ready;
  int at_barrier = 0, barrier_line = 0, left = 0;
  Context scheduler;
  const GuardedMemory* shared = nullptr;
  void (*body)(const void*) = nullptr;
  const void* argument = nullptr;
};
ATTNRB_EMULATION_LOCAL __thread Block* block = nullptr;
ATTNRB_EMULATION_LOCAL __thread uint64_t order = 0;

// Below `count`, which is small: the upper half of a product with 32 random bits.
size_t draw(size_t count) {
  order ^= order << 13;
  order ^= order >> 7;
  order ^= order << 17;
  return size_t((order >> 32) * count >> 32);
}

Fiber& running() { return block->fibers[size_t(current.thread)]; }

// Goes on with a fiber that is ready, drawn at random, or with the scheduler where none is.
void go_on(Context& from) {
  std::vector<int>& ready = block->ready;
  if (ready.empty()) return Context::swap(from, block->scheduler);
  const size_t pick = draw(ready.size());
  const int thread = ready[pick];
  ready[pick] = ready.back();
  ready.pop_back();
  Context& to = block->fibers[size_t(thread)].context;
  current.thread = thread;
  if (&to != &from) Context::swap(from, to);
}

void wait() { go_on(running().context); }

// All threads from `first` on go on, in any order.
void release(int first, int count) {
  for (int thread = first; thread < first + count; ++thread) block->ready.push_back(thread);
  wait();
}

void fiber_main() {
  block->body(block->argument);
  if (!running().copies.empty()) fail("%zu copies were never waited for", running().copies.size());
  --block->left;
  wait();
  fail("a thread that had ended was run");
}

void run_block() {
  go_on(block->scheduler);
  if (block->left == 0) return;
  for (const Warp& warp : block->warps)
    if (warp.arrived != 0)
      fail("divergent warp: %d of 32 lanes wait at the %s of line %d", warp.arrived, warp.what, warp.line);
  fail("divergent block: %d of %d threads wait at the barrier of line %d", block->at_barrier, block->threads,
       block->barrier_line);
}

}  // namespace

void warp_meet(const char* what, int line, void* argument, void (*operate)(void* const (&)[32])) {
  const int thread = current.thread;
  Warp& warp = block->warps[size_t(thread / 32)];
  if (warp.arrived == 0) {
    warp.what = what;
    warp.line = line;
  } else if (warp.line != line || (warp.what != what && std::strcmp(warp.what, what) != 0)) {
    fail("divergent warp: one lane is at the %s of line %d, another at the %s of line %d", what, line, warp.what,
         warp.line);
  }
  warp.arguments[thread % 32] = argument;
  if (++warp.arrived < 32) return wait();
  warp.arrived = 0;
  operate(warp.arguments);
  release(thread / 32 * 32, 32);
}

void block_meet(int line) {
  if (block->at_barrier == 0)
    block->barrier_line = line;
  else if (block->barrier_line != line)
    fail("divergent block: one thread is at the barrier of line %d, another at that of line %d", line,
         block->barrier_line);
  if (++block->at_barrier < block->threads) return wait();
  block->at_barrier = 0;
  release(0, block->threads);
}

void start_copy(void* shared, const void* global, bool valid) {
  if (!block->shared->contains(shared, 16)) fail("a copy to outside shared memory");
  if (reinterpret_cast<uintptr_t>(shared) % 16 != 0) fail("a copy to an address that is not aligned to 16 bytes");
  if (valid && reinterpret_cast<uintptr_t>(global) % 16 != 0)
    fail("a copy from an address that is not aligned to 16 bytes");
  std::memset(shared, 0xff, 16);
  running().copies.push_back({shared, global, valid, running().groups});
}

void commit_copies() { ++running().groups; }

void finish_copies(int groups_left) {
  std::vector<Copy>& copies = running().copies;
  const int64_t end = running().groups - groups_left;
  size_t done = 0;
  for (; done < copies.size() && copies[done].group < end; ++done) {
    if (copies[done].valid)
      std::memcpy(copies[done].shared, copies[done].global, 16);
    else
      std::memset(copies[done].shared, 0, 16);
  }
  copies.erase(copies.begin(), copies.begin() + std::ptrdiff_t(done));
}

void run_blocks(int64_t blocks, int threads, int64_t shared_bytes, void (*body)(const void*), const void* argument) {
  if (blocks <= 0) return;
  if (threads % 32 != 0) fail("blocks of whole warps expected");
  const GuardedMemory shared{size_t(shared_bytes)};
  // Kept between calls: stacks are large.
  static thread_local std::vector<unsigned char> stacks;
  if (stacks.size() < size_t(threads) * kStackSpacing + 64) stacks.resize(size_t(threads) * kStackSpacing + 64);
  unsigned char* first_stack = stacks.data() + (64 - reinterpret_cast<uintptr_t>(stacks.data()) % 64);
  // Goes on from launch to launch: the same work again runs in another order, and must give the same bits.
  if (order == 0) {
    const char* seed = std::getenv("ATTNRB_EMULATION_SEED");
    order = (seed == nullptr ? 1 : std::strtoull(seed, nullptr, 10)) * 0x9e3779b97f4a7c15u | 1;
  }

  Block state;
  state.threads = threads;
  state.fibers.resize(size_t(threads));
  state.warps.resize(size_t(threads / 32));
  state.shared = &shared;
  state.body = body;
  state.argument = argument;
  block = &state;
  for (int64_t index = 0; index < blocks; ++index) {
    const_cast<GuardedMemory&>(shared).poison();
    state.left = threads;
    for (int thread = 0; thread < threads; ++thread) {
      unsigned char* stack = first_stack + size_t(thread) * kStackSpacing;
#if defined(__SANITIZE_ADDRESS__)
      ASAN_UNPOISON_MEMORY_REGION(stack, kStackBytes);
#endif
      state.fibers[size_t(thread)].context.prepare(stack, fiber_main);
      state.ready.push_back(thread);
    }
    current = {0, index, shared.data()};
    run_block();
    shared.check_margin();
  }
  block = nullptr;
}

namespace {

void check_rows(const void* row) {
  if (!block->shared->contains(row, 16)) fail("ldmatrix reads outside shared memory");
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) fail("ldmatrix reads a row that is not aligned to 16 bytes");
}

struct Matrices {
  uint32_t* r;
  const void* row;
};

// See "ldmatrix" in the PTX ISA: lane l gets, of matrix m, word l % 4 of row l / 4; transposed, elements 2 (l % 4) and
// 2 (l % 4) + 1 of column l / 4.
template <bool Transposed>
void deal_matrices(void* const (&lanes)[32]) {
  uint16_t matrices[4][8][8];
  for (int lane = 0; lane < 32; ++lane)
    std::memcpy(matrices[lane / 8][lane % 8], static_cast<Matrices*>(lanes[lane])->row, 16);
  for (int lane = 0; lane < 32; ++lane)
    for (int m = 0; m < 4; ++m) {
      const int major = lane / 4, minor = lane % 4 * 2;
      const uint16_t low = Transposed ? matrices[m][minor][major] : matrices[m][major][minor];
      const uint16_t high = Transposed ? matrices[m][minor + 1][major] : matrices[m][major][minor + 1];
      static_cast<Matrices*>(lanes[lane])->r[m] = uint32_t(low) | uint32_t(high) << 16;
    }
}

// Towards zero, as tensor cores add. A number rounded away from zero is not zero, and the bits of the one before it are
// one less.
float cut_off(double x) {
  const float nearest = float(x);
  if (!(std::fabs(double(nearest)) > std::fabs(x)) || std::isinf(nearest)) return nearest;
  return bit_cast<float>(bit_cast<uint32_t>(nearest) - 1);
}

struct Product {
  float* c;
  const uint32_t* a;
  uint32_t b[2];
};

// c[16, 8] += a[16, k] b[k, 8] with the layouts of the PTX ISA, "Matrix fragments for mma.m16n8k16" and "mma.m16n8k8".
template <int K, class GetA, class GetB>
void multiply_lanes(void* const (&lanes)[32], GetA&& get_a, GetB&& get_b) {
  // Two columns in one vector: lane l holds columns 2 (l % 4) and the next.
  typedef double Pair __attribute__((vector_size(16)));
  double a[16][K];
  Pair b[K][4];
  for (int row = 0; row < 16; ++row)
    for (int k = 0; k < K; ++k) a[row][k] = get_a(row, k);
  for (int k = 0; k < K; ++k)
    for (int column = 0; column < 8; ++column) b[k][column / 2][column % 2] = get_b(k, column);
  for (int row = 0; row < 16; ++row) {
    float* c[4];
    Pair sums[4];
    for (int t = 0; t < 4; ++t) {
      c[t] = static_cast<Product*>(lanes[row % 8 * 4 + t])->c + row / 8 * 2;
      sums[t] = Pair{double(c[t][0]), double(c[t][1])};
    }
    for (int k = 0; k < K; ++k)
      for (int t = 0; t < 4; ++t) sums[t] += a[row][k] * b[k][t];
    for (int t = 0; t < 4; ++t)
      for (int e = 0; e < 2; ++e) c[t][e] = cut_off(sums[t][e]);
  }
}

template <class T>
double half_of(uint32_t word, int half) {
  return double(to_float(T{uint16_t(word >> (16 * half))}));
}

template <class T>
void multiply_halves(void* const (&lanes)[32]) {
  const auto product = [&](int lane) { return static_cast<const Product*>(lanes[lane]); };
  multiply_lanes<16>(
      lanes,
      [&](int row, int k) {
        const int lane = row % 8 * 4 + k % 8 / 2, index = (row >= 8 ? 1 : 0) + (k >= 8 ? 2 : 0);
        return half_of<T>(product(lane)->a[index], k % 2);
      },
      [&](int k, int column) { return half_of<T>(product(column * 4 + k % 8 / 2)->b[k >= 8 ? 1 : 0], k % 2); });
}

// The 13 low bits of a tf32 operand are not looked at.
double tf32_of(uint32_t word) { return double(bit_cast<float>(word & 0xffffe000u)); }

void multiply_tf32_lanes(void* const (&lanes)[32]) {
  const auto product = [&](int lane) { return static_cast<const Product*>(lanes[lane]); };
  multiply_lanes<8>(
      lanes,
      [&](int row, int k) { return tf32_of(product(row % 8 * 4 + k % 4)->a[(row >= 8 ? 1 : 0) + (k >= 4 ? 2 : 0)]); },
      [&](int k, int column) { return tf32_of(product(column * 4 + k % 4)->b[k >= 4 ? 1 : 0]); });
}

}  // namespace
}  // namespace emulation

void load_matrices(uint32_t (&r)[4], const void* row, int line) {
  emulation::check_rows(row);
  emulation::Matrices matrices{r, row};
  emulation::warp_meet("ldmatrix", line, &matrices, emulation::deal_matrices<false>);
}

void load_matrices_transposed(uint32_t (&r)[4], const void* row, int line) {
  emulation::check_rows(row);
  emulation::Matrices matrices{r, row};
  emulation::warp_meet("transposed ldmatrix", line, &matrices, emulation::deal_matrices<true>);
}

void multiply_bfloat16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, int line) {
  emulation::Product product{c, a, {b0, b1}};
  emulation::warp_meet("bfloat16 product", line, &product, emulation::multiply_halves<bfloat16>);
}

void multiply_float16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, int line) {
  emulation::Product product{c, a, {b0, b1}};
  emulation::warp_meet("float16 product", line, &product, emulation::multiply_halves<float16>);
}

void multiply_tf32(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, int line) {
  emulation::Product product{c, a, {b0, b1}};
  emulation::warp_meet("tf32 product", line, &product, emulation::multiply_tf32_lanes);
}

}  // namespace attnrb::cuda
