//! (skeleton)
use crate::Result;
pub struct Cpu;
pub struct Isa;
impl Isa { pub fn name(&self) -> &'static str { "avx512" } }
impl Cpu { pub fn new(_threads: usize) -> Result<Self> { todo!() } pub fn threads(&self) -> usize { todo!() } pub fn isa(&self) -> Isa { Isa } }
