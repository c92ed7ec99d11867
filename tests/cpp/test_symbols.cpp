// No object that is compiled for one instruction set may define a symbol that another defines too: the linker keeps one
// of them, perhaps one that the processor at hand cannot run.
#include <gtest/gtest.h>

#include <cstdio>
#include <map>
#include <set>
#include <sstream>
#include <string>

namespace attnrb::testing {
namespace {

std::string output_of(const std::string& command) {
  std::string text;
  FILE* pipe = popen(command.c_str(), "r");
  if (pipe == nullptr) return text;
  char part[4096];
  for (size_t count; (count = fread(part, 1, sizeof(part), pipe)) > 0;) text.append(part, count);
  pclose(pipe);
  return text;
}

// The objects that define each symbol which the linker merges: weak ones, and unique ones.
std::map<std::string, std::set<std::string>> merged_symbols(const std::string& listing) {
  std::map<std::string, std::set<std::string>> symbols;
  std::istringstream lines(listing);
  std::string object;
  for (std::string line; std::getline(lines, line);) {
    std::istringstream words(line);
    std::string name, kind;
    words >> name >> kind;
    if (kind.empty() && !name.empty() && name.back() == ':') object = name;
    // What the unwinder is pointed to by is a pointer, and no code.
    if (kind.size() == 1 && std::string("VWuvw").find(kind) != std::string::npos && name.rfind("DW.ref.", 0) != 0)
      symbols[name].insert(object);
  }
  return symbols;
}

TEST(Symbols, OfOneInstructionSetAreItsOwn) {
#if !defined(__OPTIMIZE__)
  GTEST_SKIP() << "without optimisation nothing is inlined";
#endif
  const std::string nm = ATTNRB_TEST_NM;
  const std::string listing = nm.empty() ? "" : output_of(nm + " --defined-only --format=posix " ATTNRB_TEST_CORE);
  if (listing.empty()) GTEST_SKIP() << "there is no nm to look with";
  const auto symbols = merged_symbols(listing);
  int64_t kernels = 0;
  for (const auto& [name, objects] : symbols) {
    EXPECT_EQ(objects.size(), 1u) << name << " is defined by " << *objects.begin() << " and by " << *objects.rbegin();
    kernels += name.find("portable") != std::string::npos;
  }
  EXPECT_GT(kernels, 10) << "kernels are templates, so there should be some";
}

}  // namespace
}  // namespace attnrb::testing
