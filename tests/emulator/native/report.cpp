// report.cpp - what went wrong, where, and how to see it again.
#include <dlfcn.h>

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "fiber.h"
#include "machine.h"

namespace emu {

static std::string format(const char* pattern, va_list arguments) {
  char buffer[1200];
  vsnprintf(buffer, sizeof buffer, pattern, arguments);
  return buffer;
}

std::string text(const char* pattern, ...) {
  va_list arguments;
  va_start(arguments, pattern);
  std::string s = format(pattern, arguments);
  va_end(arguments);
  return s;
}

static const char* file_name(const char* path) {
  const char* slash = strrchr(path, '/');
  return slash ? slash + 1 : path;
}

std::string position(Location at) { return text("%s:%u", file_name(at.file_name()), at.line()); }

// The source lines of a code address, innermost first, by addr2line (of binutils, which g++ needs anyway).
static std::string source_lines(void* caller) {
  Dl_info info;
  if (!caller || !dladdr(caller, &info) || !info.dli_fname) return "?";
  const long offset = static_cast<u8*>(caller) - static_cast<u8*>(info.dli_fbase) - 1;
  const std::string command = text("addr2line -i -s -e '%s' %#lx 2>/dev/null", info.dli_fname, offset);
  std::string lines;
  if (FILE* pipe = popen(command.c_str(), "r")) {
    char line[256];
    while (fgets(line, sizeof line, pipe)) {
      line[strcspn(line, " \n")] = 0;
      if (!lines.empty()) lines += " from ";
      lines += line;
    }
    pclose(pipe);
  }
  return lines.empty() ? text("%s+%#lx", file_name(info.dli_fname), offset) : lines;
}

static const char* const kSchedules[] = {"forward", "reverse", "random", "priority"};
static const char* const kDeliveries[] = {"early", "late", "random"};

[[noreturn]] static void stop(const std::string& place, const std::string& message) {
  if (!current) {  // outside a kernel: the launcher reads the message
    machine.error = message;
    throw Failure{};
  }
  const Options& o = machine.options;
  const Thread& t = *current;
  machine.error = place + ": " + message +
                  text(" [block (%u,%u,%u), thread %u = (%u,%u,%u); schedule=%s, delivery=%s, seed=%llu]",
                       t.block_index.x, t.block_index.y, t.block_index.z, t.number, t.thread_index.x, t.thread_index.y,
                       t.thread_index.z, kSchedules[o.schedule], kDeliveries[o.delivery], (unsigned long long)o.seed);
  current = nullptr;
  void* never_resumed;
  switch_stack(&never_resumed, machine.main_stack);
  __builtin_unreachable();
}

void fail(const char* pattern, ...) {
  va_list arguments;
  va_start(arguments, pattern);
  const std::string message = format(pattern, arguments);
  va_end(arguments);
  if (current && me().doing) stop(position(me().at), std::string(me().doing) + ": " + message);
  stop("?", message);
}

void fail_at(void* caller, const std::string& message) {
  if (!caller) fail("%s", message.c_str());
  stop(source_lines(caller), message);
}

}  // namespace emu
