# Builds and installs the library, its headers, and mxtrain; cargo does the work, and Python 3 collects
# the licences of what is linked in.
#
#   make
#   make install PREFIX=/usr/local DESTDIR=
#   make uninstall PREFIX=/usr/local DESTDIR=
#   make portable                       # dist/, which runs with any glibc from $(FLOOR) on
#   make wheel                          # the same for Python, dist/*.whl
#
# After an install to a system folder run ldconfig. Names may have blanks. Nothing that is installed
# names PREFIX, so the tree may be moved as a whole.

PREFIX ?= /usr/local
BINDIR ?= $(PREFIX)/bin
LIBDIR ?= $(PREFIX)/lib
INCLUDEDIR ?= $(PREFIX)/include
DATADIR ?= $(PREFIX)/share
CARGO ?= cargo
INSTALL ?= install
# The oldest glibc that `make portable` is for. It is also that of Rust's own standard library.
FLOOR ?= 2.17

VERSION := $(shell sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -n 1)
ABI := $(shell sed -n 's/^\#define MXT_ABI_VERSION //p' include/mxfp4train.h)
RELEASE := target/release
HEADERS := include/mxfp4train.h bindings/cpp/mxfp4train.hpp
TEMPLATES := mxfp4train.pc mxfp4train-config.cmake mxfp4train-config-version.cmake
SUPPRESSIONS := packaging/tsan.supp packaging/valgrind.supp
LICENCES := LICENSE-MIT LICENSE-APACHE
NOTICES := target/release/THIRD-PARTY.txt

BIN := $(DESTDIR)$(BINDIR)
INCLUDE := $(DESTDIR)$(INCLUDEDIR)
LIB := $(DESTDIR)$(LIBDIR)
DATA := $(DESTDIR)$(DATADIR)/mxfp4train
CMAKE := $(LIB)/cmake/mxfp4train

# NOTE: where there is no cargo, as under sudo, what an earlier `make` built is taken.
all:
	if command -v "$(CARGO)" >/dev/null || ! [ -e $(RELEASE)/mxtrain ]; then \
	  "$(CARGO)" build --release --locked --target-dir target -p mxfp4train -p mxtrain && \
	  CARGO="$(CARGO)" python3 dev/third-party.py $(NOTICES); \
	fi
	dev/static-library.sh target/release/libmxfp4train.a target/release/libmxfp4train-packed.a

install: all
	$(MAKE) --no-print-directory tree

# What is in the folder RELEASE, as an installed tree.
tree:
	$(INSTALL) -d "$(BIN)" "$(INCLUDE)" "$(LIB)/pkgconfig" "$(CMAKE)" "$(DATA)"
	$(INSTALL) -m 755 $(RELEASE)/mxtrain "$(BIN)/mxtrain"
	$(INSTALL) -m 644 $(HEADERS) "$(INCLUDE)"
	$(INSTALL) -m 644 $(RELEASE)/libmxfp4train-packed.a "$(LIB)/libmxfp4train.a"
	$(INSTALL) -m 755 $(RELEASE)/libmxfp4train.so "$(LIB)/libmxfp4train.so.$(VERSION)"
	ln -sf libmxfp4train.so.$(VERSION) "$(LIB)/libmxfp4train.so.$(ABI)"
	ln -sf libmxfp4train.so.$(ABI) "$(LIB)/libmxfp4train.so"
	$(INSTALL) -m 644 $(SUPPRESSIONS) $(LICENCES) $(NOTICES) "$(DATA)"
	include=$$(realpath -ms --relative-to="$(LIBDIR)" "$(INCLUDEDIR)") && \
	prefix=$$(realpath -ms --relative-to="$(LIBDIR)" "$(PREFIX)") && \
	for file in $(TEMPLATES); do \
	  sed -e 's|@VERSION@|$(VERSION)|g; s|@ABI@|$(ABI)|g' \
	    -e "s|@INCLUDE_FROM_LIB@|$$include|g; s|@PREFIX_FROM_LIB@|$$prefix|g" \
	    packaging/$$file.in > $(RELEASE)/$$file || exit 1; \
	done
	$(INSTALL) -m 644 $(RELEASE)/mxfp4train.pc "$(LIB)/pkgconfig"
	$(INSTALL) -m 644 $(RELEASE)/mxfp4train-config.cmake \
	  $(RELEASE)/mxfp4train-config-version.cmake "$(CMAKE)"

uninstall:
	rm -f "$(BIN)/mxtrain" "$(INCLUDE)/mxfp4train.h" "$(INCLUDE)/mxfp4train.hpp" \
	  "$(LIB)/libmxfp4train.a" "$(LIB)/libmxfp4train.so" "$(LIB)/libmxfp4train.so.$(ABI)" \
	  "$(LIB)/libmxfp4train.so.$(VERSION)" "$(LIB)/pkgconfig/mxfp4train.pc"
	rm -rf "$(CMAKE)" "$(DATA)"

portable: all
	dev/portable.sh $(FLOOR) target/portable
	$(MAKE) --no-print-directory tree RELEASE=target/portable PREFIX=/ DESTDIR="$(CURDIR)/dist" \
	  BINDIR=/bin LIBDIR=/lib INCLUDEDIR=/include DATADIR=/share

wheel: portable
	packaging/wheel.sh $(FLOOR) target/portable $(NOTICES) dist

.PHONY: all install tree uninstall portable wheel
