# Builds and installs the library, its header, and mxtrain; cargo does the work.
#
#   make
#   make install PREFIX=/usr/local DESTDIR=
#   make uninstall PREFIX=/usr/local DESTDIR=
#
# After an install to a system folder run ldconfig.

PREFIX ?= /usr/local
BINDIR ?= $(PREFIX)/bin
LIBDIR ?= $(PREFIX)/lib
INCLUDEDIR ?= $(PREFIX)/include
CARGO ?= cargo
INSTALL ?= install

VERSION := $(shell sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -n 1)
ABI := $(shell sed -n 's/^\#define MXT_ABI_VERSION //p' include/mxfp4train.h)
RELEASE := target/release
HEADERS := include/mxfp4train.h $(wildcard bindings/cpp/mxfp4train.hpp)
TEMPLATES := mxfp4train.pc mxfp4train-config.cmake mxfp4train-config-version.cmake

LIB := $(DESTDIR)$(LIBDIR)
CMAKE := $(LIB)/cmake/mxfp4train

all:
	$(CARGO) build --release --locked --target-dir target -p mxfp4train -p mxtrain
	dev/static-library.sh $(RELEASE)/libmxfp4train.a $(RELEASE)/libmxfp4train-packed.a
	for file in $(TEMPLATES); do \
	  sed -e 's|@PREFIX@|$(PREFIX)|; s|@LIBDIR@|$(LIBDIR)|; s|@INCLUDEDIR@|$(INCLUDEDIR)|' \
	    -e 's|@VERSION@|$(VERSION)|g; s|@ABI@|$(ABI)|g' \
	    -e "s|@INCLUDE_FROM_LIB@|$$(realpath -m --relative-to=$(LIBDIR) $(INCLUDEDIR))|" \
	    packaging/$$file.in > $(RELEASE)/$$file || exit 1; \
	done

install: all
	$(INSTALL) -d $(DESTDIR)$(BINDIR) $(DESTDIR)$(INCLUDEDIR) $(LIB)/pkgconfig $(CMAKE)
	$(INSTALL) -m 755 $(RELEASE)/mxtrain $(DESTDIR)$(BINDIR)/mxtrain
	$(INSTALL) -m 644 $(HEADERS) $(DESTDIR)$(INCLUDEDIR)
	$(INSTALL) -m 644 $(RELEASE)/libmxfp4train-packed.a $(LIB)/libmxfp4train.a
	$(INSTALL) -m 755 $(RELEASE)/libmxfp4train.so $(LIB)/libmxfp4train.so.$(VERSION)
	ln -sf libmxfp4train.so.$(VERSION) $(LIB)/libmxfp4train.so.$(ABI)
	ln -sf libmxfp4train.so.$(ABI) $(LIB)/libmxfp4train.so
	$(INSTALL) -m 644 $(RELEASE)/mxfp4train.pc $(LIB)/pkgconfig
	$(INSTALL) -m 644 $(RELEASE)/mxfp4train-config.cmake $(RELEASE)/mxfp4train-config-version.cmake \
	  $(CMAKE)

uninstall:
	rm -f $(DESTDIR)$(BINDIR)/mxtrain $(DESTDIR)$(INCLUDEDIR)/mxfp4train.h \
	  $(DESTDIR)$(INCLUDEDIR)/mxfp4train.hpp $(LIB)/libmxfp4train.a \
	  $(LIB)/libmxfp4train.so $(LIB)/libmxfp4train.so.$(ABI) $(LIB)/libmxfp4train.so.$(VERSION) \
	  $(LIB)/pkgconfig/mxfp4train.pc
	rm -rf $(CMAKE)

.PHONY: all install uninstall
